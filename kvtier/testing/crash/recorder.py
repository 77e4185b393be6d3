"""The recorder of file-changing calls: compiled here, loaded into another process, started there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from kvtier.errors import MissingDependencyError, StorageError

__all__ = ["compile_recorder", "mark", "start_recording"]

_SOURCE = Path(__file__).with_name("recorder.c")


def compile_recorder(directory: Path) -> Path:
    """Build the shared object that ``LD_PRELOAD`` names.

    Raises
    ------
    MissingDependencyError
        There is no C compiler.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MissingDependencyError("recording file calls needs a C compiler, and neither gcc nor cc was found")
    built = directory / "kvtier-recorder.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(built), str(_SOURCE), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingDependencyError(f"{compiler} could not build the recorder: {done.stderr[-500:]}")
    return built


def start_recording(directory: Path, log: Path) -> None:
    """Record from now on what this process, started with the recorder, does below a directory.

    Raises
    ------
    StorageError
        The recorder is not loaded, or the log cannot be written.
    """
    try:
        start = ctypes.CDLL(None).kvtier_recorder_start
    except AttributeError as missing:
        raise StorageError("the recorder is not loaded; start the process with LD_PRELOAD") from missing
    code = start(os.fsencode(directory.resolve()), os.fsencode(log))
    if code:
        raise StorageError(f"the log {log} cannot be written ({os.strerror(code)})")


def mark(data: bytes) -> None:
    """Put a note into the log, between the calls before and after it; nothing where no recorder is loaded."""
    noted = getattr(ctypes.CDLL(None), "kvtier_recorder_mark", None)
    if noted is not None:
        noted(data, ctypes.c_size_t(len(data)))
