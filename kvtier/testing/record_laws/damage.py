"""Laws of damage: a miss, counted, put aside; never an exception, never a wrong byte."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from kvtier.storage_backends.records import PutState, RecordStore
from kvtier.testing.faults.files import files_below
from kvtier.testing.record_laws.base import LAW, Fault, LawsBase, file_damage, put_all, right_or_missing
from kvtier.testing.record_samples import OpenStore, fetch, sample_bytes, sample_key, sample_record

__all__ = ["DamageLaws"]

_SIZES = {n: (70_000, 4096, 1, 150_001)[n % 4] for n in range(16)}


class DamageLaws(LawsBase):
    """Whatever happens to stored bytes."""

    @LAW
    @given(seed=st.integers(0, 2**32 - 1), hurts=st.integers(1, 3))
    def test_damage_to_an_open_store(
        self, store: OpenStore, faults: Sequence[Fault], tmp_path: Path, seed: int, hurts: int
    ) -> None:
        """Reads are right or miss; each loss was counted and its record put aside, and the key can be put again."""
        rng = random.Random(seed)
        with _place(tmp_path) as directory, store(directory, self.capacity_bytes) as opened:
            put_all(opened, [sample_record(n, size) for n, size in _SIZES.items()])
            opened.flush()
            if file_damage in faults and not files_below(directory):
                pytest.skip("the store has no files that could be damaged: override the fixture 'faults'")
            for _ in range(hurts):
                rng.choice(faults)(opened, directory, rng)
            missing = right_or_missing(opened, _SIZES)
            assert hurts > 1 or not missing or _counted(opened) > 0, "lost without a count"
            _put_aside(opened, missing)
            if not opened.stats().degraded:
                _takes_more(opened)

    @LAW
    @given(seed=st.integers(0, 2**32 - 1), hurts=st.integers(1, 3))
    def test_damage_to_a_closed_store(
        self, persistent: OpenStore, faults: Sequence[Fault], tmp_path: Path, seed: int, hurts: int
    ) -> None:
        """It opens whatever was done to its files; what is left is right; what is lost was counted."""
        rng = random.Random(seed)
        with _place(tmp_path) as directory:
            with persistent(directory, self.capacity_bytes) as opened:
                put_all(opened, [sample_record(n, size) for n, size in _SIZES.items()])
            for _ in range(hurts):
                rng.choice(faults)(None, directory, rng)
            with persistent(directory, self.capacity_bytes) as opened:
                missing = right_or_missing(opened, _SIZES)
                assert hurts > 1 or not missing or _counted(opened) > 0, "lost without a count"
                _put_aside(opened, missing)
                _takes_more(opened)
            with persistent(directory, self.capacity_bytes) as opened:
                again = right_or_missing(
                    opened, {n: size for n, size in _SIZES.items() if n not in missing} | {99: 5000}
                )
                assert again == [], "what survived the damage was lost at the next opening"

    @LAW
    @given(seed=st.integers(0, 2**32 - 1))
    def test_files_that_vanish(self, persistent: OpenStore, tmp_path: Path, seed: int) -> None:
        """Files removed while the store is open, and while it is closed: right or missing, and it goes on."""
        rng = random.Random(seed)
        with _place(tmp_path) as directory:
            with persistent(directory, self.capacity_bytes) as opened:
                put_all(opened, [sample_record(n, size) for n, size in _SIZES.items()])
                rng.choice(files_below(directory)).unlink()
                right_or_missing(opened, _SIZES)
            if left := files_below(directory):
                rng.choice(left).unlink()
            with persistent(directory, self.capacity_bytes) as opened:
                _put_aside(opened, right_or_missing(opened, _SIZES))
                _takes_more(opened)

    def test_files_that_are_not_ours_do_not_matter(self, persistent: OpenStore, tmp_path: Path) -> None:
        """Strange files in the directory are neither opened as ours nor deleted."""
        with _place(tmp_path) as directory:
            (directory / "lost+found").mkdir()
            (directory / "README.txt").write_bytes(b"not a record")
            with persistent(directory, self.capacity_bytes) as opened:
                put_all(opened, [sample_record(n, size) for n, size in _SIZES.items()])
            with persistent(directory, self.capacity_bytes) as opened:
                assert right_or_missing(opened, _SIZES) == []
            assert (directory / "README.txt").read_bytes() == b"not a record"
            assert (directory / "lost+found").is_dir()


def _counted(store: RecordStore) -> int:
    """What the store says it found."""
    stats = store.stats()
    note(str(stats))
    return stats.damaged + stats.failed


def _put_aside(store: RecordStore, missing: list[int]) -> None:
    """What is missing is not claimed, and can be put again."""
    assert not store.contains([sample_key(n) for n in missing]).any(), "a damaged record is still claimed"
    for number in missing:
        (outcome,) = store.put([sample_record(number, 3000, generation=1)])
        assert outcome.state is not PutState.EXISTS
        served = fetch(store, number, 3000)
        assert served in {sample_bytes(number, 1, 3000), None}


def _takes_more(store: RecordStore) -> None:
    """A new record can be stored and read."""
    (outcome,) = store.put([sample_record(99, 5000)])
    assert outcome.state is PutState.STORED, f"the store takes nothing any more: {outcome.reason}"
    assert fetch(store, 99, 5000) == sample_bytes(99, 0, 5000)


@contextmanager
def _place(parent: Path) -> Iterator[Path]:
    """A fresh directory, removed afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)
