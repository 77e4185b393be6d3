"""A sweep of corruptions: one after another in the files of a store, each followed by a read of everything."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import StorageError
from kvtier.storage_backends.records import PutState, RecordStore
from kvtier.testing.crash.check import keep_evidence
from kvtier.testing.crash.disk import read_tree, write_tree
from kvtier.testing.crash.kills import Subject
from kvtier.testing.crash.load import load_target, size_of
from kvtier.testing.faults.files import damage_files
from kvtier.testing.record_samples import OpenStore, fetch, sample_bytes, sample_key, sample_record

__all__ = ["Corruption", "corrupt_again_and_again"]

_RECORDS = 48
_PROBE = 2_000_000


@dataclass(frozen=True, slots=True)
class Corruption:
    """One corruption and what came of it.

    Attributes
    ----------
    words : str
        What was done, to which file, and whether the store was open.
    lost : int
        Records that were missing afterwards.
    counted : int
        What the store says that it found damaged or unreadable.
    problems : tuple of str
        Wrong bytes, exceptions, losses that were not counted, records that came back; empty when all is well.
    """

    words: str
    lost: int
    counted: int
    problems: tuple[str, ...]


def corrupt_again_and_again(
    subject: Subject, scratch: Path, corruptions: int, seed: int, *, evidence: Path | None = None
) -> Iterator[Corruption]:
    """Damage a store's files once and read everything, each time from the same undamaged state.

    Parameters
    ----------
    subject : Subject
        What is damaged; its load and promise play no part.
    scratch : Path
        An existing directory for everything.
    corruptions, seed : int
        How many, and of all that is random. Every second one hits an open store.
    evidence : Path, optional
        Where directories are kept, as the damage left them, whose reading found a problem.
    """
    opens = load_target(subject.target)
    directory = scratch / "corrupted"
    directory.mkdir()
    alive = _fill(opens, directory, subject.capacity_bytes)
    whole = read_tree(directory)
    for turn in range(corruptions):
        rng = random.Random(seed * 1_000_003 + turn)
        shutil.rmtree(directory)
        directory.mkdir()
        write_tree(directory, whole)
        found = _corrupt_once(opens, directory, subject.capacity_bytes, alive, rng, while_open=turn % 2 == 1)
        if found.problems and evidence is not None:
            keep_evidence(evidence, f"corruption-{turn}", read_tree(directory), (found.words, *found.problems))
        yield found
    shutil.rmtree(directory)


def _fill(opens: OpenStore, directory: Path, capacity_bytes: int) -> dict[int, int]:
    """Records of odd sizes, every sixth deleted again; sizes of those that are there."""
    sizes = {number: size_of(number, 0) for number in range(_RECORDS)}
    with opens(directory, capacity_bytes) as store:
        for number, size in sizes.items():
            (outcome,) = store.put([sample_record(number, size)])
            if outcome.state is not PutState.STORED:
                raise StorageError(f"the store must hold {_RECORDS} records, got {outcome}; give it more capacity")
        gone = [number for number in sizes if number % 6 == 5]
        store.delete([sample_key(number) for number in gone])
    return {number: size for number, size in sizes.items() if number not in gone}


def _corrupt_once(
    opens: OpenStore,
    directory: Path,
    capacity_bytes: int,
    alive: dict[int, int],
    rng: random.Random,
    *,
    while_open: bool,
) -> Corruption:
    words = "" if while_open else damage_files(directory, rng)
    problems: list[str] = []
    lost = counted = 0
    try:
        with opens(directory, capacity_bytes) as store:
            if while_open:
                words = f"{damage_files(directory, rng)}, while open"
            lost = _read_all(store, alive, problems)
            stats = store.stats()
            counted = stats.damaged + stats.failed
            store.put([sample_record(_PROBE, 5000)])
        with opens(directory, capacity_bytes) as store:
            _read_all(store, alive, problems)
            if fetch(store, _PROBE, 5000) not in {None, sample_bytes(_PROBE, 0, 5000)}:
                problems.append("what was stored after the damage is wrong")
    except Exception as error:  # noqa: BLE001 - the finding itself
        problems.append(f"an exception reached the caller: {error!r}")
    if lost > counted:
        problems.append(f"{lost} records lost, {counted} counted")
    return Corruption(words, lost, counted, tuple(problems))


def _read_all(store: RecordStore, alive: dict[int, int], problems: list[str]) -> int:
    """Read every number, those that were deleted too; how many are missing."""
    lost = 0
    for number in range(_RECORDS):
        size = alive.get(number, size_of(number, 0))
        served = fetch(store, number, size)
        if served is None:
            lost += number in alive
        elif number not in alive:
            problems.append(f"record {number} was deleted and is back")
        elif served != sample_bytes(number, 0, size):
            problems.append(f"record {number}: wrong bytes were served")
    return lost
