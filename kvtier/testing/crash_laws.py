"""The laws of crashes: subclass `CrashLaws` in a test file, and your store is killed, cut off and corrupted."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from kvtier.errors import MissingDependencyError, StorageError
from kvtier.testing.crash.check import Promise, examine
from kvtier.testing.crash.corruption import corrupt_again_and_again
from kvtier.testing.crash.journal import Ledger, Note, read_journal
from kvtier.testing.crash.kills import Subject, kill_again_and_again
from kvtier.testing.crash.load import Load, load_target
from kvtier.testing.crash.losses import lose_power_again_and_again
from kvtier.testing.crash.recorder import compile_recorder
from kvtier.testing.crash.worker import Job, Nursery

__all__ = ["CrashLaws", "Load", "Promise", "Subject"]

_PATIENCE_S = 60.0


class CrashLaws:
    """What a persistent record store keeps when its process or its machine goes down; override the fixture ``subject``.

    ``python -m kvtier.testing.soak`` does the same thousands of times.

    Attributes
    ----------
    kills, power_losses, corruptions : int
        How often each happens. Power losses are simulated: see `kvtier.testing.crash.disk`.
    seed : int
        Of all that is random.

    Examples
    --------
    ::

        class TestMyRecordsCrash(CrashLaws):
            @pytest.fixture
            def subject(self) -> Subject:
                return Subject(target="my_package.stores:open_my_records")
    """

    kills: ClassVar[int] = 12
    power_losses: ClassVar[int] = 30
    corruptions: ClassVar[int] = 100
    seed: ClassVar[int] = 0

    @pytest.fixture
    def subject(self) -> Subject:
        """Say how the store is opened in another process, and what it promises."""
        pytest.fail("override the fixture 'subject': return a Subject(target='package.module:function')")

    def test_kills(self, subject: Subject, tmp_path: Path) -> None:
        """SIGKILL at failpoints and at any moment: it opens, nothing acknowledged is lost, nothing deleted is back."""
        found = [
            (kill.where, problem)
            for kill in kill_again_and_again(subject, tmp_path, self.kills, self.seed)
            for problem in kill.findings.problems
        ]
        assert not found, _list(found)

    def test_kills_while_it_evicts(self, subject: Subject, tmp_path: Path) -> None:
        """The same in a store that is always full: only what is leased must be there."""
        found = [
            (kill.where, problem)
            for kill in kill_again_and_again(_full(subject), tmp_path, self.kills, self.seed)
            for problem in kill.findings.problems
        ]
        assert not found, _list(found)

    def test_simulated_power_losses(self, subject: Subject, tmp_path: Path) -> None:
        """What was not synced is dropped, torn and reordered: durable loses nothing, relaxed what it announced."""
        _needs_compiler(tmp_path)
        found = [
            (f"event {loss.event} of {loss.events}", problem)
            for loss in lose_power_again_and_again(subject, tmp_path, self.power_losses, self.seed)
            for problem in loss.findings.problems
        ]
        assert not found, _list(found)

    def test_simulated_power_losses_while_it_evicts(self, subject: Subject, tmp_path: Path) -> None:
        """The same in a store that is always full."""
        _needs_compiler(tmp_path)
        found = [
            (f"event {loss.event} of {loss.events}", problem)
            for loss in lose_power_again_and_again(_full(subject), tmp_path, self.power_losses, self.seed)
            for problem in loss.findings.problems
        ]
        assert not found, _list(found)

    def test_corruptions(self, subject: Subject, tmp_path: Path) -> None:
        """Any damage to any file: no wrong byte, no exception, no loss that was not counted."""
        found = []
        lost = 0
        for corruption in corrupt_again_and_again(subject, tmp_path, self.corruptions, self.seed):
            lost += corruption.lost
            found += [(corruption.words, problem) for problem in corruption.problems]
        assert not found, _list(found)
        assert lost > 0, "the damage hit nothing: the sweep proves nothing"

    def test_two_processes_on_one_directory(self, subject: Subject, tmp_path: Path) -> None:
        """The second is refused, with the directory's name, or both are right; after a kill the directory is free."""
        directory, journal = tmp_path / "store", tmp_path / "journal"
        directory.mkdir()
        opens = load_target(subject.target)
        job = Job(
            target=subject.target,
            directory=str(directory),
            journal=str(journal),
            capacity_bytes=subject.capacity_bytes,
            load=replace(subject.load, operations=1_000_000, first_generation=1),
            kill_after_s=2.5,
        )
        with Nursery(subject.target) as nursery:
            worker = threading.Thread(target=nursery.run, args=(job,))
            worker.start()
            try:
                end = time.monotonic() + _PATIENCE_S
                while not any(line.note is Note.STORED for line in read_journal(journal)) and time.monotonic() < end:
                    time.sleep(0.01)
                try:
                    opens(directory, subject.capacity_bytes).close()
                except StorageError as refusal:
                    named = str(directory) in str(refusal)
                else:
                    named = True
            finally:
                worker.join()
        assert named, "the refusal must name the directory"
        ledger = Ledger().read(read_journal(journal))
        findings = examine(opens, directory, subject.capacity_bytes, ledger, subject.promise)
        assert not findings.problems


def _full(subject: Subject) -> Subject:
    """The same store with too little room for its load."""
    capacity = subject.capacity_bytes // 2
    load = replace(subject.load, filler=capacity // 32)
    return replace(subject, capacity_bytes=capacity, promise=replace(subject.promise, evicts=True), load=load)


def _needs_compiler(scratch: Path) -> None:
    try:
        compile_recorder(scratch)
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


def _list(found: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{where}: {problem}" for where, problem in found[:20])
