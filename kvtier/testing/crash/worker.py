"""Worker processes that are there to die: forked from one process that has everything imported already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from kvtier.errors import StorageError
from kvtier.storage_backends import failpoints
from kvtier.testing.crash.journal import Journal, Note
from kvtier.testing.crash.load import Load, load_target, run_load
from kvtier.testing.crash.recorder import start_recording

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Job", "Nursery"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker is told.

    Parameters
    ----------
    target : str
        Where the store's opening function is: see `load_target`.
    directory, journal : str
        The store's directory, and the file for acknowledgements.
    capacity_bytes : int
        Bound of the store.
    load : Load
        What to do.
    log : str
        The recorder's log; empty: nothing is recorded.
    failpoint : str
        Where to die by SIGKILL; empty: nowhere.
    nth : int
        At which visit of it, 1 the first.
    kill_after_s : float
        Killed by SIGKILL so long after it was forked; 0: not.
    """

    target: str
    directory: str
    journal: str
    capacity_bytes: int
    load: Load = field(default_factory=Load)
    log: str = ""
    failpoint: str = ""
    nth: int = 1
    kill_after_s: float = 0.0


class Nursery:
    """A process that forks workers, one at a time.

    Parameters
    ----------
    target : str
        Imported before anything is forked.
    preload : Path, optional
        Shared object for ``LD_PRELOAD``: the recorder.

    Notes
    -----
    The process that forks has no threads. Close it when all workers have ended.
    """

    def __init__(self, target: str, preload: Path | None = None) -> None:
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.failpoints = self._receive().failpoints
        """Named places where a worker of this target can die."""

    def run(self, job: Job) -> int:
        """Fork a worker and wait until it has ended; its exit status, negative for a signal."""
        if self._process.stdin is None:
            raise StorageError("the nursery is closed; make another")
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return self._receive().status

    def close(self) -> None:
        """End the process; idempotent."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> _Answer:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise StorageError("the process that forks workers ended; its standard error says why")
        failpoints, status = json.loads(line)
        return _Answer(tuple(failpoints), status)


class _Answer(NamedTuple):
    """A line from the nursery."""

    failpoints: tuple[str, ...]
    status: int


def _work(job: Job) -> None:
    """Open the store, run the load, close it; or die on the way."""
    if job.log:
        start_recording(Path(job.directory), Path(job.log))
    journal = Journal(Path(job.journal))
    if job.failpoint:
        failpoints.active[job.failpoint] = _Countdown(job.nth)
    try:
        with load_target(job.target)(Path(job.directory), job.capacity_bytes) as store:
            journal.write(Note.OPENED)
            run_load(store, job.load, journal)
    except Exception as error:  # noqa: BLE001 - the finding itself
        journal.write(Note.RAISED, text=f"open or close: {error!r}")
        traceback.print_exc()
        return
    journal.write(Note.CLOSED)


class _Countdown:
    """Kills this process at the nth call."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


def _main(target: str) -> None:
    """Fork a worker for each line of standard input, and say how it ended."""
    load_target(target)
    names = sorted(failpoints.NAMES)
    print(json.dumps([names, 0]), flush=True)  # noqa: T201 - the protocol
    for line in sys.stdin:
        fields = json.loads(line)
        job = Job(**fields | {"load": Load(**fields["load"])})
        pid = os.fork()
        if not pid:
            _work(job)
            sys.stderr.flush()
            os._exit(0)
        if job.kill_after_s:
            time.sleep(job.kill_after_s)
            os.kill(pid, signal.SIGKILL)  # nobody waited for it yet, so the number is still its own
        _, status = os.waitpid(pid, 0)
        print(json.dumps([names, os.waitstatus_to_exitcode(status)]), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    _main(sys.argv[1])
