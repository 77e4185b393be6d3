"""fio: what the drive gives to plain reads and writes of the same sizes in the same directory, at several settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["SETTINGS", "FioError", "Load", "Setting", "missing", "run", "version"]


class FioError(RuntimeError):
    """fio is not there or did not run; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How fio submits: an engine, requests under way at once, and threads."""

    engine: str
    depth: int = 1
    threads: int = 1

    @property
    def label(self) -> str:
        """Short, for a table."""
        name = self.engine.removeprefix("io_")
        return f"{name} QD{self.depth}" if self.threads == 1 else f"{name} x{self.threads}"


SETTINGS: Final = (
    Setting(engine="psync"),
    Setting(engine="psync", threads=4),
    Setting(engine="io_uring", depth=8),
    Setting(engine="io_uring", depth=16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is moved.

    Parameters
    ----------
    piece_bytes, total_bytes : int
        Of a request, and of all.
    sync_every : int or None
        A fdatasync after so many writes.
    then : tuple of str
        Which reads of what was written follow: ``"read"``, ``"randread"``.
    """

    piece_bytes: int
    total_bytes: int
    sync_every: int | None = None
    then: tuple[str, ...] = ()


def run(load: Load, setting: Setting, directory: Path, *, direct: bool) -> dict[str, float]:
    """Bytes a second of ``"write"`` and of each read that follows.

    Writes go to new files with their space taken, as the first fill of a store does; each thread has its own.

    Raises
    ------
    FioError
        When fio refuses or fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / "store.fio"
    try:
        script.write_text("\n".join(_script(load, setting, directory, direct=direct)) + "\n", encoding="utf-8")
        found = _output(["--output-format=json", str(script)])
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {job["jobname"]: job["write" if job["jobname"] == "write" else "read"]["bw_bytes"] for job in found["jobs"]}


def _script(load: Load, setting: Setting, directory: Path, *, direct: bool) -> list[str]:
    sync = [] if load.sync_every is None else [f"fdatasync={max(1, load.sync_every // setting.threads)}"]
    lines = [
        "[global]",
        f"directory={directory}",
        "filename_format=data.$jobnum",
        f"direct={int(direct)}",
        f"bs={load.piece_bytes}",
        f"size={load.total_bytes // setting.threads}",
        f"ioengine={setting.engine}",
        f"iodepth={setting.depth}",
        f"numjobs={setting.threads}",
        "fallocate=posix",
        "thread=1",
        "group_reporting=1",
        "invalidate=1",
        *("[write]", "rw=write", *sync),
    ]
    for kind in load.then:
        lines += [f"[{kind}]", "stonewall", f"rw={kind}"]
    return lines


def missing() -> str | None:
    """Why fio cannot run; None when it can."""
    return None if shutil.which("fio") else "fio is not installed (apt-get install fio)"


def version() -> str:
    """As fio tells it."""
    found = shutil.which("fio")
    if found is None:
        return "not installed"
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()


def _output(words: Sequence[str]) -> dict[str, Any]:
    found = shutil.which("fio")
    if found is None:
        raise FioError("fio is not installed (apt-get install fio)")
    # Its buffers in huge pages, as those of the stores are: 16 MiB at a time go half as fast again.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run([found, *words], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise FioError(lines[-1] if lines else f"fio exited with {done.returncode}")
    text = done.stdout
    result: dict[str, Any] = json.loads(text[text.index("{") :])
    return result
