"""Many small records in one read: neighbours share transfers, and each still has an outcome of its own."""

import errno
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.storage_backends.engines import EngineFile, PosixEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.records import ReadRequest
from kvtier.storage_backends.segment import SegmentRecords
from kvtier.storage_backends.segment.reader import Fetch
from kvtier.storage_backends.segment.sweeps import SWEEP_BYTES, Piece, sweeps
from kvtier.testing.faults import FaultyEngine, ReadFault
from kvtier.testing.record_samples import sample_bytes, sample_key, sample_record
from kvtier.testing.segment_stores import open_store

SIZE = 65_536
COUNT = 12
FIRST = 4096
STRIDE = 4096 + SIZE


class BadBlocks(PosixEngine):
    """A medium that never gives the bytes around some offsets, and notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__(threads=2)
        self.bad: set[int] = set()
        self.asked: list[Transfer] = []

    def read(self, transfers: Iterable[Transfer], then: Callable[[int], None] | None = None) -> list[OSError | None]:
        drawn = list(transfers)
        self.asked += drawn
        good = [at for at, transfer in enumerate(drawn) if not self._is_bad(transfer)]
        results: list[OSError | None] = [OSError(errno.EIO, os.strerror(errno.EIO))] * len(drawn)
        hook = None if then is None else lambda at: then(good[at])
        for at, error in zip(good, super().read([drawn[at] for at in good], hook), strict=True):
            results[at] = error
        return results

    def _is_bad(self, transfer: Transfer) -> bool:
        size = sum(buffer.numel() for buffer in (transfer.buffer, *transfer.behind))
        return any(transfer.offset <= offset < transfer.offset + size for offset in self.bad)


def fill(store: SegmentRecords) -> None:
    store.put([sample_record(number, SIZE) for number in range(COUNT)])


def read(store: SegmentRecords, numbers: Sequence[int], shift: int = 0) -> list[bool]:
    """Read records in one request; what is served must be right."""
    room = [empty_aligned(shift + SIZE)[shift:] for _ in numbers]
    served = store.read([ReadRequest(sample_key(number), into) for number, into in zip(numbers, room, strict=True)])
    for number, into, good in zip(numbers, room, served, strict=True):
        assert not good or into.numpy().tobytes() == sample_bytes(number, 0, SIZE)
    return served


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("known", [True, False], ids=["headers-known", "headers-unknown"])
@pytest.mark.parametrize("turned", [0, 5, COUNT - 1])
def test_a_flipped_bit_takes_one_record_out(tmp_path: Path, shift: int, known: bool, turned: int) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        if known:
            assert all(read(store, range(COUNT), shift))
        path = tmp_path / "segment-00000001.kvt"
        with path.open("r+b") as file:
            at = FIRST + turned * STRIDE + 4096 + 1234
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
            os.fsync(file.fileno())
        if not known:
            store.close()
            store = open_store(tmp_path)
        served = read(store, range(COUNT), shift)
        assert served == [number != turned for number in range(COUNT)]
        assert store.stats().damaged == 1
        assert read(store, range(COUNT)) == served, "a damaged record came back, or took others along"
        store.close()


@pytest.mark.parametrize("numbers", [list(range(COUNT)), [9, 2, 3, 4, 11, 0], [5, 5, 4, 5]])
def test_any_order_gaps_and_repeats(tmp_path: Path, numbers: list[int]) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        assert read(store, numbers) == [True] * len(numbers)
        assert read(store, [*numbers, 99]) == [*[True] * len(numbers), False]
        assert store.stats().misses == 1


@pytest.mark.parametrize("bad", [{FIRST + 4 * STRIDE + 4096}, {FIRST + 4 * STRIDE + 100}])
def test_what_fails_together_is_read_again_one_by_one(tmp_path: Path, bad: set[int]) -> None:
    """A bad block in a payload takes that record; one in a gap, the header that nobody asked for, takes none."""
    with BadBlocks() as engine, open_store(tmp_path, engine=engine) as store:
        fill(store)
        engine.bad = bad
        engine.asked.clear()
        lost = 4 if bad == {FIRST + 4 * STRIDE + 4096} else None
        assert read(store, range(COUNT)) == [number != lost for number in range(COUNT)]
        assert store.stats().failed == (lost is not None)
        assert any(transfer.behind for transfer in engine.asked), "neighbours were to share transfers"


@pytest.mark.parametrize("fault", list(ReadFault))
def test_faults_of_a_shared_transfer_serve_no_wrong_byte(tmp_path: Path, fault: ReadFault) -> None:
    with FaultyEngine(PosixEngine(threads=2)) as engine, open_store(tmp_path, engine=engine) as store:
        fill(store)
        engine.on_read(fault, nth=2)
        served = read(store, range(COUNT))
        assert sum(served) >= COUNT // 2
        stats = store.stats()
        assert stats.damaged + stats.failed == COUNT - sum(served)
        assert all(served) == (fault is ReadFault.ERROR), "an error that passes is read over, a lie is a miss"


FILES = [cast("EngineFile", object()) for _ in range(2)]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 80), st.sampled_from([0, 0, 0, 1])), max_size=30),
    gap=st.integers(0, 100),
)
def test_every_piece_is_carried_once_and_neighbours_leave_no_hole(sizes: list[tuple[int, int, int]], gap: int) -> None:
    memory, offset, pieces = empty_aligned(80 * 4096), 0, []
    for skip, blocks, which in sizes:
        offset += skip * 1024
        fetch = cast("Fetch", SimpleNamespace(segment=SimpleNamespace(file=FILES[which])))
        pieces.append(Piece(fetch, offset, memory[: blocks * 4096], 0, ()))
        offset += blocks * 4096
    drawn = list(sweeps(pieces, gap * 4096))

    assert [piece for sweep in drawn for piece in sweep.pieces] == pieces
    for transfer, members in drawn:
        buffers = (transfer.buffer, *transfer.behind)
        starts = [transfer.offset]
        for buffer in buffers:
            starts.append(starts[-1] + buffer.numel())
        places = {(at, buffer.data_ptr(), buffer.numel()) for at, buffer in zip(starts, buffers, strict=False)}
        for piece in members:
            assert piece.fetch.segment.file is transfer.file
            assert (piece.offset, piece.buffer.data_ptr(), piece.buffer.numel()) in places
        assert len(buffers) == 1 or starts[-1] - starts[0] <= max(SWEEP_BYTES + gap * 4096, 600 * 1024)


def test_small_neighbours_share_a_transfer_and_large_ones_do_not() -> None:
    fetch = cast("Fetch", SimpleNamespace(segment=SimpleNamespace(file=FILES[0])))
    small, large = torch.empty(SIZE, dtype=torch.uint8), torch.empty(2 * SWEEP_BYTES, dtype=torch.uint8)
    order = random.Random(0).sample(range(64), 64)
    near = [Piece(fetch, number * STRIDE, small, 0, ()) for number in sorted(order)]

    assert len(list(sweeps(near, 4096))) < 24
    assert len(list(sweeps(near, 0))) == 64
    far = [Piece(fetch, number * large.numel(), large, 0, ()) for number in range(3)]
    assert [len(sweep.pieces) for sweep in sweeps(far, 4096)] == [1, 1, 1]
