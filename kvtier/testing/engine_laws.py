"""The laws of I/O engines: subclass `EngineLaws` in a test file and they run on your engine."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import errno
import itertools
import random
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import ClassVar, TypeAlias

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.errors import InputError, StorageError
from kvtier.storage_backends.engines.base import EngineFile, IOEngine, Transfer, host_bytes
from kvtier.storage_backends.memory import empty_aligned
from kvtier.testing.leaks import NoLeaks

__all__ = ["EngineFactory", "EngineLaws", "aligned_bytes", "random_bytes"]

EngineFactory: TypeAlias = Callable[[], IOEngine]
"""Makes a fresh engine."""

_BLOCK = 4096
_LAW = settings(
    deadline=None,
    # The factory fixture makes a fresh engine at each call, so sharing it between examples is safe.
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ],
)
_EDGES = st.one_of(
    st.integers(0, 300_000),
    st.integers(0, 80).map(lambda block: block * _BLOCK),
    st.integers(1, 80).map(lambda block: block * _BLOCK - 1),
    st.integers(1, 80).map(lambda block: block * _BLOCK + 1),
)


class EngineLaws(NoLeaks):
    """What every I/O engine keeps; override the fixture ``engine``.

    Attributes
    ----------
    large_bytes : int
        Size of a transfer that the engine cuts into pieces.

    Examples
    --------
    ::

        class TestMyEngine(EngineLaws):
            @pytest.fixture
            def engine(self) -> EngineFactory:
                return MyEngine
    """

    large_bytes: ClassVar[int] = (20 << 20) + 4097

    @pytest.fixture
    def engine(self) -> EngineFactory:
        """Say how an engine is made."""
        pytest.fail("override the fixture 'engine': return a function () -> IOEngine")

    @_LAW
    @given(data=st.data())
    def test_any_batch_round_trips(self, engine: EngineFactory, tmp_path: Path, data: st.DataObject) -> None:
        """Writes at any offsets and sizes, from one buffer or several, change these bytes and no others."""
        path = tmp_path / "any"
        path.unlink(missing_ok=True)
        model = bytearray()
        with engine() as opened:
            file = opened.open(path, writable=True, create=True)
            for seed in range(data.draw(st.integers(1, 4), label="batches")):
                batch = _drawn_batch(data, file, seed)
                assert opened.write(batch) == [None] * len(batch)
                for transfer in batch:
                    _note(model, transfer.offset, _joined(transfer))
            wanted = [_blank(transfer) for transfer in _drawn_batch(data, file, 99) if _end(transfer) <= len(model)]
            assert opened.read(wanted) == [None] * len(wanted)
            for transfer in wanted:
                assert _raw(_joined(transfer)) == model[transfer.offset : _end(transfer)]
            assert file.size == len(model)
            file.sync()
            file.close()
        assert path.read_bytes() == model

    def test_a_large_transfer_is_one_transfer(self, engine: EngineFactory, tmp_path: Path) -> None:
        """However it is cut, each hook runs once, ``before`` ahead of every byte and ``then`` after all."""
        with engine() as opened, closing(opened.open(tmp_path / "large", writable=True, create=True)) as file:
            sent, received = torch.zeros(self.large_bytes, dtype=torch.uint8), _empty(self.large_bytes)
            seen: list[object] = []

            def fill(index: int) -> None:
                seen.append(("before", index))
                sent.copy_(random_bytes(5, self.large_bytes))

            def compare(index: int) -> None:
                seen.append(("then", index, torch.equal(received, sent)))

            assert opened.write([Transfer(file, 4096, sent)], fill) == [None]
            assert opened.read([Transfer(file, 4096, received)], compare) == [None]
            assert seen == [("before", 0), ("then", 0, True)]

    def test_hooks_run_once_for_each_transfer(self, engine: EngineFactory, tmp_path: Path) -> None:
        """Adjacent, scattered and empty transfers alike; what ``before`` puts into a buffer is what is stored."""
        sizes = [4096, 4096, 100, 0, 65_536, 3996, 8192, 0]
        offsets = [0, 4096, 8192, 8292, 12_288, 8292, 200_000, 0]
        with engine() as opened, closing(opened.open(tmp_path / "hooks", writable=True, create=True)) as file:
            batch = [Transfer(file, offset, _empty(size)) for offset, size in zip(offsets, sizes, strict=True)]
            filled: list[int] = []
            lock = threading.Lock()

            def fill(index: int) -> None:
                batch[index].buffer.copy_(random_bytes(index, sizes[index]))
                with lock:
                    filled.append(index)

            assert not any(opened.write(batch, fill))
            back = [_blank(transfer) for transfer in batch]
            equal: dict[int, bool] = {}

            def compare(index: int) -> None:
                equal[index] = _raw(back[index].buffer) == _raw(batch[index].buffer)

            assert not any(opened.read(back, compare))
            assert sorted(filled) == sorted(equal) == list(range(len(batch)))
            assert all(equal.values())

    def test_writes_may_be_drawn(self, engine: EngineFactory, tmp_path: Path) -> None:
        """A buffer filled as it is drawn is stored so; what drawing raises is raised, and the engine goes on."""
        with engine() as opened, closing(opened.open(tmp_path / "drawn", writable=True, create=True)) as file:
            content = random_bytes(6, 20 * 300_000)
            buffers = [_empty(300_000) for _ in range(20)]

            def coming(stop: int) -> Iterator[Transfer]:
                for index, buffer in enumerate(buffers):
                    if index == stop:
                        raise LookupError("no more")
                    buffer.copy_(content[index * 300_000 : (index + 1) * 300_000])
                    yield Transfer(file, index * 300_000, buffer)

            with pytest.raises(LookupError, match="no more"):
                opened.write(coming(13))
            assert opened.write(coming(20)) == [None] * 20
            assert opened.write(iter([])) == []
            assert (tmp_path / "drawn").read_bytes() == _raw(content)

    def test_each_transfer_has_its_own_error(self, engine: EngineFactory, tmp_path: Path) -> None:
        """Bytes past the end are EIO for those that ask for them, adjacent to others or not; no hook runs for them."""
        with engine() as opened, closing(opened.open(tmp_path / "short", writable=True, create=True)) as file:
            content = random_bytes(1, 10_000)
            assert opened.write([Transfer(file, 0, content)]) == [None]
            spans = [(0, 4096), (4096, 4096), (8192, 1808), (8192, 4096), (10_000, 1), (9_990, 10), (20_480, 4096)]
            batch = [Transfer(file, offset, _empty(size)) for offset, size in spans]
            ended: list[int] = []
            results = opened.read(batch, ended.append)
            short = [offset + size > 10_000 for offset, size in spans]
            assert [result is not None for result in results] == short
            assert {result.errno for result in results if result is not None} == {errno.EIO}
            assert sorted(ended) == [index for index, bad in enumerate(short) if not bad]
            for (offset, size), transfer, bad in zip(spans, batch, short, strict=True):
                assert bad or torch.equal(transfer.buffer, content[offset : offset + size])

    def test_a_hook_that_raises_is_raised_after_the_others_ended(self, engine: EngineFactory, tmp_path: Path) -> None:
        """The other transfers are complete, the engine goes on; a transfer whose ``before`` raised is left out."""
        with engine() as opened, closing(opened.open(tmp_path / "raises", writable=True, create=True)) as file:
            assert opened.write([Transfer(file, 0, torch.zeros(8 * _BLOCK, dtype=torch.uint8))]) == [None]
            batch = [Transfer(file, i * _BLOCK, random_bytes(i, _BLOCK)) for i in range(8)]

            def refuse(index: int) -> None:
                if index == 3:
                    raise LookupError("no digest for 3")

            with pytest.raises(LookupError, match="no digest for 3"):
                opened.write(batch, refuse)
            back = [_blank(transfer) for transfer in batch]
            with pytest.raises(LookupError, match="no digest for 3"):
                opened.read(back, refuse)
            for index, (sent, received) in enumerate(zip(batch, back, strict=True)):
                same = torch.zeros(_BLOCK, dtype=torch.uint8) if index == 3 else sent.buffer
                assert torch.equal(received.buffer, same)
            assert opened.read(back) == [None] * 8

    def test_many_threads_share_an_engine_and_a_file(self, engine: EngineFactory, tmp_path: Path) -> None:
        """Each thread finds its own bytes, whatever shares a block with them."""
        with engine() as opened, closing(opened.open(tmp_path / "shared", writable=True, create=True)) as file:

            def work(worker: int) -> bool:
                rng = random.Random(worker)
                right = True
                for turn in range(12):
                    cuts = sorted(rng.sample(range(100_000), 8))
                    spans = [(worker * 100_000 + a, b - a) for a, b in itertools.pairwise(cuts)]
                    batch = [Transfer(file, at, random_bytes(turn + at, size)) for at, size in spans]
                    right &= not any(opened.write(batch))
                    back = [_blank(transfer) for transfer in batch]
                    right &= not any(opened.read(back))
                    right &= all(torch.equal(a.buffer, b.buffer) for a, b in zip(batch, back, strict=True))
                return right

            with ThreadPoolExecutor(6) as pool:
                assert all(pool.map(work, range(6)))

    def test_allocate_takes_the_space(self, engine: EngineFactory, tmp_path: Path) -> None:
        """The size is what was asked for, its blocks are there, what was written stays; a refusal changes nothing."""
        with engine() as opened, closing(opened.open(tmp_path / "space", writable=True, create=True)) as file:
            content = random_bytes(2, 8192)
            assert opened.write([Transfer(file, 0, content)]) == [None]
            file.allocate(1 << 20)
            assert file.size == 1 << 20
            assert file.allocated_bytes >= 1 << 20
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
            try:
                with pytest.raises(OSError, match=r"."):
                    file.allocate(4 << 20)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert file.size == 1 << 20
            file.allocate(8192)
            assert file.size == 8192
            assert file.allocated_bytes < 1 << 20
            assert opened.read([Transfer(file, 0, back := _empty(8192))]) == [None]
            assert torch.equal(back, content)

    def test_opening_makes_a_file_only_when_told(self, engine: EngineFactory, tmp_path: Path) -> None:
        """A file that is not there is an OSError; one that is there keeps its bytes, ``create`` or not."""
        path = tmp_path / "there"
        with engine() as opened:
            with pytest.raises(FileNotFoundError):
                opened.open(path, writable=True)
            assert not path.exists()
            path.write_bytes(content := b"kept" * 5000)
            for create in (False, True):
                with closing(opened.open(path, writable=True, create=create)) as file:
                    assert file.size == len(content)
            with closing(opened.open(path, writable=False)) as file:
                (refused,) = opened.write([Transfer(file, 0, random_bytes(3, 4096))])
                assert isinstance(refused, OSError)
                assert opened.read([Transfer(file, 1, back := _empty(4096))]) == [None]
                assert _raw(back) == content[1:4097]
        assert path.read_bytes() == content

    def test_what_is_closed_answers_with_errors(self, engine: EngineFactory, tmp_path: Path) -> None:
        """A closed file fails its own transfers; a closed engine raises; closing twice is fine."""
        opened = engine()
        file = opened.open(tmp_path / "one", writable=True, create=True)
        other = opened.open(tmp_path / "other", writable=True, create=True)
        file.close()
        file.close()
        results = opened.write([Transfer(file, 0, random_bytes(1, 10)), Transfer(other, 0, random_bytes(1, 10))])
        assert isinstance(results[0], OSError)
        assert results[1] is None
        assert file.allocated_bytes == 0
        other.close()
        opened.close()
        opened.close()
        with pytest.raises(StorageError, match="closed"):
            opened.read([Transfer(other, 0, _empty(10))])

    def test_close_waits_for_what_is_under_way(self, engine: EngineFactory, tmp_path: Path) -> None:
        """A batch that has begun ends, hooks and all."""
        opened = engine()
        with closing(opened.open(tmp_path / "busy", writable=True, create=True)) as file:
            begun, go_on = threading.Event(), threading.Event()

            def hold(_: int) -> None:
                begun.set()
                go_on.wait(30)

            with ThreadPoolExecutor(2) as pool:
                writing = pool.submit(opened.write, [Transfer(file, 0, random_bytes(4, 5000))], hold)
                assert begun.wait(30)
                shutting = pool.submit(opened.close)
                assert not shutting.done()
                go_on.set()
                assert writing.result(30) == [None]
                shutting.result(30)
        assert (tmp_path / "busy").read_bytes() == _raw(random_bytes(4, 5000))

    @pytest.mark.parametrize(
        "buffer",
        [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]],
        ids=["type", "shape", "gaps"],
    )
    def test_other_buffers_are_refused_before_anything_moves(
        self, engine: EngineFactory, tmp_path: Path, buffer: torch.Tensor
    ) -> None:
        """Only uint8 vectors without gaps, and offsets of at least 0."""
        with engine() as opened, closing(opened.open(tmp_path / "bad", writable=True, create=True)) as file:
            good = Transfer(file, 0, random_bytes(1, 100))
            with pytest.raises(InputError, match="uint8 vectors"):
                opened.write([good, Transfer(file, 0, buffer)])
            with pytest.raises(InputError, match="at least 0, got -1"):
                opened.write([good, Transfer(file, -1, random_bytes(1, 100))])
            assert file.size == 0
            assert opened.read([]) == opened.write([]) == []

    @pytest.mark.gpu
    def test_cuda_buffers_round_trip(self, engine: EngineFactory, tmp_path: Path) -> None:
        """From and to GPU memory, at odd offsets too; a digest hook sees the bytes through `host_bytes`."""
        with engine() as opened, closing(opened.open(tmp_path / "cuda", writable=True, create=True)) as file:
            if not opened.capabilities().cuda_buffers:
                pytest.skip(f"the {opened.capabilities().name} engine takes no CUDA tensors here")
            for offset, size in ((0, 1 << 20), (4096 + 7, 3_000_001), (1, 1)):
                sent = random_bytes(offset, size).cuda()
                back = torch.zeros_like(sent)
                wanted = [Transfer(file, offset, back)]
                seen: dict[int, bytes] = {}

                def digest(index: int, wanted: Sequence[Transfer] = wanted, seen: dict[int, bytes] = seen) -> None:
                    seen[index] = _raw(wanted[index].buffer)

                assert opened.write([Transfer(file, offset, sent)]) == [None]
                assert opened.read(wanted, digest) == [None]
                assert torch.equal(sent, back)
                assert seen == {0: _raw(sent)}


def random_bytes(seed: int, size: int) -> torch.Tensor:
    """A uint8 vector that depends on the seed alone."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned_bytes(seed: int, size: int) -> torch.Tensor:
    """The same, aligned as direct I/O asks."""
    return empty_aligned(size).copy_(random_bytes(seed, size))


def _empty(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def _raw(buffer: torch.Tensor) -> bytes:
    return host_bytes(buffer).numpy().tobytes()


def _joined(transfer: Transfer) -> torch.Tensor:
    return torch.cat([transfer.buffer, *transfer.behind])


def _end(transfer: Transfer) -> int:
    return transfer.offset + _joined(transfer).numel()


def _blank(transfer: Transfer) -> Transfer:
    """The same place with other buffers, wrong in every byte."""
    return transfer._replace(buffer=transfer.buffer ^ 0xFF, behind=[buffer ^ 0xFF for buffer in transfer.behind])


def _note(model: bytearray, offset: int, buffer: torch.Tensor) -> None:
    """Write into the model, which grows with zeros as a file does."""
    if buffer.numel():
        model.extend(bytes(max(0, offset + buffer.numel() - len(model))))
        model[offset : offset + buffer.numel()] = _raw(buffer)


def _cut(data: st.DataObject, buffer: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The same bytes as one buffer or as several, some of them empty."""
    cuts = sorted(min(cut, buffer.numel()) for cut in data.draw(st.lists(_EDGES, max_size=3), label="parts"))
    first, *others = [buffer[a:b] for a, b in itertools.pairwise([0, *cuts, buffer.numel()])]
    return first, others


def _drawn_batch(data: st.DataObject, file: EngineFile, seed: int) -> Sequence[Transfer]:
    """Disjoint pieces of a file in any order, in buffers that start on a page or anywhere."""
    cuts = sorted(data.draw(st.lists(_EDGES, min_size=2, max_size=10), label="cuts"))
    batch = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        if data.draw(st.booleans(), label="taken"):
            shift = data.draw(st.sampled_from([0, 0, 1, 100]), label="shift")
            buffer = empty_aligned(shift + end - start)[shift:] if end > start else _empty(0)
            buffer.copy_(random_bytes(seed * 100 + number, end - start))
            batch.append(Transfer(file, start, *_cut(data, buffer)))
    return data.draw(st.permutations(batch), label="order")
