"""Simulated power losses under a mixed load: everything that was not synced is dropped, torn or reordered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvtier.errors import StorageError
from kvtier.testing.crash.check import Findings, examine
from kvtier.testing.crash.disk import SimulatedDisk, Tree, read_tree, write_tree
from kvtier.testing.crash.journal import Ledger, Note, parse_line
from kvtier.testing.crash.kills import Subject
from kvtier.testing.crash.load import load_target
from kvtier.testing.crash.log import Event, Kind, read_log
from kvtier.testing.crash.recorder import compile_recorder
from kvtier.testing.crash.worker import Job, Nursery
from kvtier.testing.record_samples import OpenStore

__all__ = ["PowerLoss", "lose_power_again_and_again"]

_PROMISES = {Note.STORED, Note.DELETED, Note.FLUSHED, Note.CLOSED}


@dataclass(frozen=True, slots=True)
class PowerLoss:
    """One simulated power loss, after so many of the events of a recording, and what was found after it."""

    event: int
    events: int
    findings: Findings


@dataclass(slots=True)
class _Recording:
    """A directory, what is known to be in it, and what a worker then did to it."""

    directory: Path
    log: Path
    known: dict[int, int | None]
    start: Tree


def lose_power_again_and_again(
    subject: Subject, scratch: Path, losses: int, seed: int, *, each: int = 25
) -> Iterator[PowerLoss]:
    """Record workers, and lose power ``each`` times in every recording.

    Every second worker starts from what a power loss left, so that recoveries are interrupted too. Each recording is
    proved complete: replayed to its end, it must give the files that are really there.

    Raises
    ------
    StorageError
        The store changes files in a way that the recorder does not see.
    MissingDependencyError
        There is no C compiler.
    """
    rng = np.random.default_rng(seed)
    opens = load_target(subject.target)
    with Nursery(subject.target, preload=compile_recorder(scratch)) as nursery:
        left: tuple[dict[int, int | None], Tree] = {}, {}
        for turn, count in enumerate([each] * (losses // each) + [losses % each] * (losses % each > 0)):
            known, start = left if turn % 2 else ({}, {})
            recording = _Recording(scratch / "store", scratch / "log", dict(known), start)
            _record(nursery, subject, recording, turn, int(rng.integers(2**31)))
            for loss, state in _replay(opens, subject, recording, count, rng):
                left = dict(loss.findings.generations), state
                yield loss
    for place in (scratch / "store", scratch / "crashed"):
        shutil.rmtree(place, ignore_errors=True)


def _record(nursery: Nursery, subject: Subject, recording: _Recording, turn: int, seed: int) -> None:
    """Run a worker to its end under the recorder."""
    _fill(recording.directory, recording.start)
    journal = recording.log.with_name("journal")
    journal.unlink(missing_ok=True)
    job = Job(
        target=subject.target,
        directory=str(recording.directory.resolve()),
        journal=str(journal),
        log=str(recording.log),
        capacity_bytes=subject.capacity_bytes,
        load=replace(subject.load, seed=seed, first_generation=1 + turn * 10_000),
    )
    status = nursery.run(job)
    if status:
        raise StorageError(f"the recorded worker must end by itself, got status {status}; its standard error says why")


def _replay(
    opens: OpenStore, subject: Subject, recording: _Recording, count: int, rng: np.random.Generator
) -> Iterator[tuple[PowerLoss, Tree]]:
    """Replay a recording and lose power at ``count`` places of it."""
    events = list(read_log(recording.log))
    places = set(_places(events, count, rng))
    disk = SimulatedDisk(recording.directory.resolve(), recording.start)
    ledger = Ledger(recording.known)
    crashed = recording.directory.with_name("crashed")
    for at, event in enumerate(events):
        disk.apply(event)
        if event.kind is Kind.MARK:
            ledger.take(parse_line(bytes(event.data)))
        if at in places:
            _fill(crashed, disk.crash(rng))
            findings = examine(opens, crashed, subject.capacity_bytes, ledger, subject.promise)
            yield PowerLoss(at, len(events), findings), read_tree(crashed)
    _prove_complete(disk, recording.directory)


def _places(events: list[Event], count: int, rng: np.random.Generator) -> list[int]:
    """Where to lose power: half of the places right behind a promise, where a missing sync shows, half anywhere."""
    promises = [
        at
        for at, event in enumerate(events)
        if event.kind is Kind.MARK and parse_line(bytes(event.data)).note in _PROMISES
    ]
    behind = rng.choice(promises, min(len(promises), count // 2), replace=False).tolist() if promises else []
    others = rng.permutation(len(events)).tolist()
    return list(dict.fromkeys(behind + others))[:count]


def _prove_complete(disk: SimulatedDisk, directory: Path) -> None:
    """Compare the replay with the real directory."""
    simulated, real = disk.now(), read_tree(directory)
    different = sorted(name for name in {*simulated, *real} if simulated.get(name, b"?") != real.get(name, b"?"))
    if different:
        raise StorageError(
            f"the recording of {directory} misses changes to {', '.join(different)}; they were made by calls that the "
            "recorder does not see (io_uring, a shared mapping, another process)"
        )


def _fill(directory: Path, tree: Tree) -> None:
    """Make a directory hold just this."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    write_tree(directory, tree)
