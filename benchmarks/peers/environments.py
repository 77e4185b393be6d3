"""Environments of the stores that kvtier is compared with: pinned, made when asked for, in a folder that git ignores.

An environment holds what its ``requirements.txt`` names, without further dependencies, and borrows the rest (torch,
numpy) from the interpreter that runs the benchmark: both sides of a comparison then run on the same torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.process import command_of

__all__ = [
    "HERE",
    "KVPRESS",
    "PEERS",
    "EnvironmentBuildError",
    "Peer",
    "command",
    "install",
    "installed",
    "packages",
    "serving",
]

HERE: Final = Path(__file__).resolve().parent
_CACHE: Final = Path(os.environ.get("KVTIER_PEERS", HERE.parent.parent / ".peers"))
_READY: Final = ".ready"
_UNPACKED: Final = "unpacked"


class EnvironmentBuildError(RuntimeError):
    """A peer's environment could not be made; the message is the installer's last line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A store that can be compared.

    Parameters
    ----------
    label : str
        How tables call it.
    folder, runner : str
        Where its ``requirements.txt`` and its runner lie; peers of one folder share an environment.
    options : mapping
        Further arguments of the runner's ``Store``.
    unpack : str
        Names within the wheel that are unpacked, where the wheel is not installed.
    slow_start : bool
        Opening takes many seconds: it takes part in the first round alone, and only where there is something to read.
    """

    label: str
    folder: str
    runner: str = "runner.py"
    options: Mapping[str, Any] = field(default_factory=dict)
    unpack: str = ""
    slow_start: bool = False

    @property
    def requirements(self) -> Path:
        """What its environment holds."""
        return HERE / self.folder / "requirements.txt"


PEERS: Final[Mapping[str, Peer]] = {
    "fs_native": Peer(label="LMCache fs_native", folder="lmcache", runner="fs_native.py"),
    "raw_block": Peer(label="LMCache raw_block posix", folder="lmcache", runner="raw_block.py"),
    "raw_block_uring": Peer(
        label="LMCache raw_block io_uring", folder="lmcache", runner="raw_block.py", options={"engine": "io_uring"}
    ),
    "vllm_fs": Peer(label="vLLM fs tier", folder="vllm_fs", unpack="vllm/v1/kv_offload/tiering/fs/io.py"),
    "nixl": Peer(label="NIXL POSIX aio", folder="nixl"),
    "nixl_uring": Peer(label="NIXL POSIX io_uring", folder="nixl", options={"queue": "uring"}),
    "mooncake": Peer(label="Mooncake SSD offload", folder="mooncake", slow_start=True),
}
"""The stores, by the name that the command line knows."""

KVPRESS: Final = Peer(label="kvpress", folder="kvpress")
"""Policies, on transformers of its own."""


def installed(peer: Peer) -> str | None:
    """Why a peer cannot run now; None when it can."""
    ready = _place(peer) / _READY
    if not ready.exists():
        return "not installed; --install makes its environment"
    if ready.read_text(encoding="ascii") != _digest(peer):
        return "its requirements changed; --install makes its environment again"
    return None


def install(peer: Peer) -> None:
    """Make a peer's environment, unless it is there.

    Raises
    ------
    EnvironmentBuildError
        When the installer fails.
    """
    if installed(peer) is None:
        return
    place = _place(peer)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=False, symlinks=True)
    if peer.unpack:
        _unpack(peer, place / _UNPACKED)
    else:
        _pip("--python", str(_python(place)), "install", "--no-deps", "--no-compile", "-r", str(peer.requirements))
    _packages(place).joinpath("borrowed.pth").write_text("\n".join(_borrowed()) + "\n", encoding="utf-8")
    (place / _READY).write_text(_digest(peer), encoding="ascii")


def command(peer: Peer) -> tuple[list[str], dict[str, str]]:
    """Command line that serves a peer, and what its environment variables need besides ours."""
    place = _place(peer)
    return serving(_python(place), HERE / peer.folder / peer.runner), {"UNPACKED": str(place / _UNPACKED)}


def serving(python: Path | str, runner: Path) -> list[str]:
    """Command line that serves the store of a runner."""
    return command_of(python, HERE / "serve.py", runner)


def packages(peer: Peer) -> Path:
    """Where the packages of a peer lie: first on ``PYTHONPATH``, they go before those of the interpreter."""
    return _packages(_place(peer))


def _place(peer: Peer) -> Path:
    return _CACHE / peer.folder


def _python(place: Path) -> Path:
    return place / "bin" / "python"


def _packages(place: Path) -> Path:
    return place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _borrowed() -> Iterator[str]:
    return (path for path in sys.path if Path(path).name == "site-packages")


def _digest(peer: Peer) -> str:
    text = peer.requirements.read_bytes() + peer.unpack.encode() + sys.version.encode()
    return hashlib.sha256(text).hexdigest()


def _pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise EnvironmentBuildError(lines[-1] if lines else f"pip exited with {done.returncode}")


def _unpack(peer: Peer, place: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "--no-deps", "--dest", folder, "-r", str(peer.requirements))
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place, [name for name in archive.namelist() if name.startswith(peer.unpack)])
