"""What is in a store after a crash, against what may be there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtier.errors import KVTierError
from kvtier.storage_backends.records import PutState, ReadRequest, RecordStore
from kvtier.testing.crash.journal import Ledger
from kvtier.testing.crash.load import size_of
from kvtier.testing.record_samples import OpenStore, fetch, generation_of, sample_bytes, sample_key, sample_record

__all__ = ["Findings", "Promise", "examine"]

_PROBE, _PROBE_BYTES = 2_000_000, 9000


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a store says it may lose.

    Parameters
    ----------
    lost_bytes : int
        Most payload bytes of acknowledged, unflushed records; 0 for a durable store.
    lost_seconds : float
        Age of the oldest of them.
    evicts : bool
        Records that are not leased may also be missing because they were evicted.
    """

    lost_bytes: int = 0
    lost_seconds: float = 0.0
    evicts: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found.

    Attributes
    ----------
    generations : dict of int to (int or None)
        Generation of each numbered record that the store serves now.
    lost_bytes : int
        Payload bytes of acknowledged records that are gone, within the promise or not.
    problems : tuple of str
        Broken promises; empty when all is well.
    """

    generations: Mapping[int, int | None]
    lost_bytes: int
    problems: tuple[str, ...]


def examine(opens: OpenStore, directory: Path, capacity_bytes: int, ledger: Ledger, promise: Promise) -> Findings:
    """Open a store twice after a crash, read everything, put something, and compare with the ledger."""
    problems = list(ledger.problems)
    generations: dict[int, int | None] = {}
    try:
        with opens(directory, capacity_bytes) as store:
            generations = _read_all(store, ledger.possible, problems)
            store.delete([sample_key(_PROBE)])
            (outcome,) = store.put([sample_record(_PROBE, _PROBE_BYTES)])
            if outcome.state is not PutState.STORED or not _probe_is_right(store):
                problems.append(f"nothing new can be stored: {outcome}")
        with opens(directory, capacity_bytes) as store:
            again = _read_all(store, ledger.possible, problems)
            if not promise.evicts and again != generations:
                problems.append(f"the second opening serves others than the first: {_differences(generations, again)}")
            if not _probe_is_right(store):
                problems.append("what was stored after the crash is gone at the next opening")
    except (KVTierError, OSError) as refusal:
        problems.append(f"the store does not open: {refusal!r}")
        return Findings(generations, 0, tuple(problems))
    lost = _compare(generations, ledger, promise, problems)
    return Findings(generations, lost, tuple(problems))


def _read_all(store: RecordStore, numbers: Iterable[int], problems: list[str]) -> dict[int, int | None]:
    """Generation of each record as it is served now."""
    found: dict[int, int | None] = {}
    for number in numbers:
        key = sample_key(number)
        claimed = bool(store.contains([key])[0])
        info = store.info(key)
        into = torch.zeros(info.payload_bytes if info else 0, dtype=torch.uint8)
        (served,) = store.read([ReadRequest(key, into)])
        found[number] = generation_of(number, into.numpy().tobytes()) if served and info else None
        if served and (found[number] is None or into.numel() != size_of(number, found[number] or 0)):
            problems.append(f"record {number}: wrong bytes were served")
        if claimed != served:
            problems.append(f"record {number}: {'claimed, but not served' if claimed else 'served, but not claimed'}")
    return found


def _compare(found: Mapping[int, int | None], ledger: Ledger, promise: Promise, problems: list[str]) -> int:
    """Note what must not be; bytes lost."""
    lost = 0
    for number, may in ledger.possible.items():
        generation = found[number]
        if generation in may:
            continue
        if generation is not None:
            problems.append(f"record {number}: generation {generation} is back, {_words(may)} may be there")
        elif number in ledger.unsynced and promise.lost_bytes:
            size, at = ledger.unsynced[number]
            lost += size
            if ledger.at - at > promise.lost_seconds:
                problems.append(f"record {number}: lost {ledger.at - at:.3f} s after it was acknowledged")
        elif not promise.evicts or number in ledger.pinned:
            problems.append(f"record {number}: acknowledged and lost, {_words(may)} must be there")
    if lost > promise.lost_bytes:
        problems.append(f"{lost} acknowledged bytes lost, {promise.lost_bytes} at most were announced")
    return lost


def _probe_is_right(store: RecordStore) -> bool:
    return fetch(store, _PROBE, _PROBE_BYTES) == sample_bytes(_PROBE, 0, _PROBE_BYTES)


def _differences(one: Mapping[int, int | None], other: Mapping[int, int | None]) -> str:
    return ", ".join(f"{n}: {one[n]} then {other[n]}" for n in one if one[n] != other[n])


def _words(may: set[int | None]) -> str:
    return " or ".join(
        "nothing" if one is None else f"generation {one}" for one in sorted(may, key=lambda g: (g is None, g or 0))
    )
