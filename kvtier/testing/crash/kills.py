"""SIGKILL in the middle of a mixed load, at a named failpoint or at any moment, again and again on one directory."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvtier.testing.crash.check import Findings, Promise, examine
from kvtier.testing.crash.journal import Ledger, Note, read_journal
from kvtier.testing.crash.load import Load, load_target
from kvtier.testing.crash.worker import Job, Nursery

__all__ = ["Kill", "Subject", "kill_again_and_again"]

_LONGEST_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The store under test.

    Parameters
    ----------
    target : str
        Its opening function: see `load_target`.
    capacity_bytes : int
        Bound to open it with.
    promise : Promise
        What it may lose.
    load : Load
        What its workers do.
    """

    target: str
    capacity_bytes: int = 8 << 20
    promise: Promise = field(default_factory=Promise)
    load: Load = field(default_factory=Load)


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill and what was found after it; ``where`` is a failpoint, a delay, or how the worker ended by itself."""

    where: str
    acknowledged: int
    findings: Findings


def kill_again_and_again(subject: Subject, scratch: Path, kills: int, seed: int, *, keep: int = 8) -> Iterator[Kill]:
    """Start workers and kill them, half at the failpoints in turn, half at random moments.

    Parameters
    ----------
    subject : Subject
        What is killed.
    scratch : Path
        An existing directory for everything.
    kills, seed : int
        How many, and of the random moments.
    keep : int
        After so many kills a new directory is begun; what survived the others stays in place until then.
    """
    rng = random.Random(seed)
    opens = load_target(subject.target)
    directory, journal = scratch / "store", scratch / "journal"
    known: dict[int, int | None] = {}
    with Nursery(subject.target) as nursery:
        points = nursery.failpoints
        for turn in range(kills):
            if turn % keep == 0:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                known = {}
            journal.unlink(missing_ok=True)
            at_point = bool(points) and turn % 2 == 0
            job = Job(
                target=subject.target,
                directory=str(directory),
                journal=str(journal),
                capacity_bytes=subject.capacity_bytes,
                load=replace(subject.load, seed=rng.randrange(2**31), first_generation=1 + turn * 10_000),
                failpoint=points[turn // 2 % len(points)] if at_point else "",
                nth=rng.choice([1, 1, 2, 3, 5, 8, 13, 30]),
            )
            if not at_point:
                job = replace(job, kill_after_s=rng.random() ** 2 * _LONGEST_S)
            where = _words(job, nursery.run(job))
            lines = read_journal(journal)
            ledger = Ledger(known).read(lines)
            findings = examine(opens, directory, subject.capacity_bytes, ledger, subject.promise)
            known = dict(findings.generations)
            yield Kill(where, sum(line.note in {Note.STORED, Note.DELETED} for line in lines), findings)
    shutil.rmtree(directory, ignore_errors=True)


def _words(job: Job, status: int) -> str:
    """How a worker died."""
    if status != -signal.SIGKILL:
        return f"ended by itself with status {status}"
    return f"{job.failpoint}, visit {job.nth}" if job.failpoint else f"after {job.kill_after_s * 1000:.1f} ms"
