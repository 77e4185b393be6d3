"""An engine and a direct file of it; a process that can use kvikio, with a stand-in for a driver that is missing."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.storage_backends.engines import PosixEngine
from kvtier.storage_backends.engines.posix_file import PosixFile

STUB = Path(__file__).with_name("libcuda_stub") / "libcuda_stub.c"
INSTALLED = Path(__file__).resolve().parents[3] / ".kvikio"


@pytest.fixture
def engine() -> Iterator[PosixEngine]:
    with PosixEngine() as engine:
        yield engine


@pytest.fixture
def file(engine: PosixEngine, tmp_path: Path) -> Iterator[PosixFile]:
    file = engine.open(tmp_path / "file", writable=True, create=True)
    if not file.direct:
        pytest.skip(f"needs direct I/O: {file.note}")
    yield file
    file.close()


@pytest.fixture
def kvikio_environment(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that can use kvikio; skips where that cannot be had."""
    environment = {name: value for name, value in os.environ.items() if name != "KVIKIO_COMPAT_MODE"}
    libraries = [environment.get("LD_LIBRARY_PATH", "")]
    if (INSTALLED / "kvikio").is_dir():
        environment["PYTHONPATH"] = str(INSTALLED)
        # kvikio looks for libcufile among the installed packages, and this is no place of theirs.
        libraries += map(str, INSTALLED.glob("nvidia/*/lib"))
    elif importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not in .kvikio; `make test` installs it there")
    if not _has_driver():
        _build_stub(tmp_path)
        libraries.append(str(tmp_path))
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    return environment


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _build_stub(directory: Path) -> None:
    """Compile ``libcuda.so.1``; skips where there is no gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed: it compiles the stand-in for libcuda")
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(directory / "libcuda.so.1"), str(STUB)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
