"""Kernels in C for the CPU: compiled on this machine when one is first asked for, kept, and done without where not.

Nothing happens at import. The first use of an operator compiles its C for exactly this CPU (a second or two) into
the user's cache directory; later processes load what is there and need no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from kvtier.errors import MissingDependencyError

__all__ = ["ELEMENT_TYPES", "Built", "built", "function", "threads_for"]

ELEMENT_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
"""How the C code names the types that it knows."""

_log = logging.getLogger("kvtier.kernels")

_HERE: Final = Path(__file__).resolve().parent
_HEADERS: Final = ("vectors.h", "*/*.h")
_COMPILERS: Final = ("cc", "gcc", "clang")
_FLAGS: Final = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
_SECONDS: Final = 120
_LEAST_SHARED: Final = 1 << 20
"""Multiplications below which starting a second thread costs more than it saves."""


class Built(NamedTuple):
    """The library of an operator, or why there is none."""

    library: ctypes.CDLL | None
    obstacle: str | None


@functools.cache
def built(operator: str) -> Built:
    """The compiled C of an operator, ``native.c`` and any other in its folder; tried once in a process."""
    try:
        sources, directory = _sources(operator), _directory()
        target = directory / f"{operator}-{_key(sources)}.so"
        if not target.exists():
            _compile(sources, target)
        # OpenMP is found in torch's own copy: one pool of threads, not two that get in each other's way.
        return Built(ctypes.CDLL(str(target)), None)
    except (OSError, RuntimeError, subprocess.SubprocessError, _CannotBuildError) as error:
        _log.info("no native %s: %s", operator, error)
        return Built(None, _in_a_line(str(error)))


def function(operator: str, name: str, arguments: Sequence[Any], result: Any) -> Callable[..., Any]:
    """A function of an operator's library, with the ctypes of its arguments and result.

    Raises
    ------
    MissingDependencyError
        When there is no library; whoever asked ``built`` before knows.
    """
    library, obstacle = built(operator)
    if library is None:
        raise MissingDependencyError(f"the native {operator} cannot run here: {obstacle}; use another implementation")
    found = getattr(library, name)
    found.argtypes, found.restype = list(arguments), result
    return found  # type: ignore[no-any-return]  # ctypes knows no signature


def threads_for(multiplications: int) -> int:
    """Threads for a call: torch's number, or one for a small call."""
    return torch.get_num_threads() if multiplications >= _LEAST_SHARED else 1


class _CannotBuildError(Exception):
    """Why nothing was compiled; told by ``kvtier doctor``, never raised to a caller."""


def _sources(operator: str) -> list[Path]:
    sources = sorted((_HERE / operator).glob("*.c"))
    if not sources:
        raise _CannotBuildError(f"{_HERE / operator} holds no C")
    return sources


def _directory() -> Path:
    """The user's own directory for compiled kernels: what others could write there would run as this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "kvtier" / "kernels"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = directory.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _CannotBuildError(f"{directory} belongs to or can be written by others; make it yours alone (chmod 700)")
    return directory


def _key(sources: Sequence[Path]) -> str:
    """Of all that the machine code depends on: sources, flags, and the CPU, since home directories move."""
    digest = hashlib.blake2b(digest_size=12)
    headers = sorted(path for pattern in _HEADERS for path in _HERE.glob(pattern))
    for part in (*(path.read_bytes() for path in (*sources, *headers)), " ".join(_FLAGS).encode(), _cpu().encode()):
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # x86 says "flags", Arm "Features".
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return f"{platform.machine()} {platform.processor()} {sorted(set(told))}"


def _compile(sources: Sequence[Path], target: Path) -> None:
    compiler = next((found for found in map(shutil.which, _COMPILERS) if found), None)
    if compiler is None:
        raise _CannotBuildError(f"there is no C compiler ({', '.join(_COMPILERS)})")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        linked = Path(scratch) / "kernel.so"
        # Two steps: one with -fopenmp would link a second OpenMP beside torch's.
        for source, into in zip(sources, compiled, strict=True):
            _run([compiler, *_FLAGS, "-I", str(_HERE), "-c", str(source), "-o", into])
        _run([compiler, "-shared", *compiled, "-o", str(linked), "-lm"])
        linked.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if done.returncode:
        raise _CannotBuildError(f"{command[0]} failed: {done.stderr}")


def _in_a_line(told: str) -> str:
    words = " ".join(told.split())
    return words if len(words) <= 200 else f"{words[:200]}..."
