"""Laws of bytes: what is read is what was put, whole or by ranges."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.storage_backends.records import ByteRange, ReadRequest
from kvtier.testing.record_laws.base import LAW, FreshStore, LawsBase, put_all
from kvtier.testing.record_samples import fetch, sample_bytes, sample_key, sample_record

__all__ = ["TransferLaws"]

_EDGES = st.sampled_from([0, 1, 511, 4095, 4096, 4097, 65_535, 65_536, 65_537, 131_072, 200_001])
_SIZES = st.one_of(_EDGES, st.integers(0, 300_000))


class TransferLaws(LawsBase):
    """Round trips of odd sizes, pieces and ranges."""

    @LAW
    @given(sizes=st.lists(_SIZES, min_size=1, max_size=5), data=st.data())
    def test_any_size_in_any_pieces_round_trips(self, fresh: FreshStore, sizes: list[int], data: st.DataObject) -> None:
        """Records of one call, each of several buffers, come back whole."""
        with fresh() as store:
            cuts = [data.draw(st.lists(st.integers(0, size), max_size=3), label="cuts") for size in sizes]
            put_all(store, [sample_record(n, sizes[n], cuts=cuts[n]) for n in range(len(sizes))])
            there = store.contains([sample_key(n) for n in range(len(sizes) + 1)])
            assert there.tolist() == [True] * len(sizes) + [False]
            for number, size in reversed(list(enumerate(sizes))):
                assert fetch(store, number, size) == sample_bytes(number, 0, size)

    @LAW
    @given(size=st.one_of(_EDGES.filter(bool), st.integers(1, 300_000)), data=st.data())
    def test_ranges_are_slices(self, fresh: FreshStore, size: int, data: st.DataObject) -> None:
        """Ascending ranges, empty and adjacent ones too, come back one after the other."""
        with fresh() as store:
            put_all(store, [sample_record(7, size)])
            whole = sample_bytes(7, 0, size)
            for _ in range(4):
                edges = sorted(data.draw(st.lists(st.integers(0, size), max_size=12), label="edges"))
                ranges = [ByteRange(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=False)]
                assert fetch(store, 7, size, ranges) == b"".join(whole[at : at + n] for at, n in ranges)

    @LAW
    @given(
        size=st.integers(1, 70_000),
        before=st.integers(0, 9),
        wanted=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    )
    def test_nothing_beside_the_target_is_touched(
        self, fresh: FreshStore, size: int, before: int, wanted: list[float]
    ) -> None:
        """``into`` may begin at any address; the bytes around it stay."""
        start, end = (int(part * size) for part in wanted)
        with fresh() as store:
            put_all(store, [sample_record(1, size)])
            room = torch.full((before + end - start + 64,), 0x5A, dtype=torch.uint8)
            into = room[before : before + end - start]
            assert store.read([ReadRequest(sample_key(1), into, (ByteRange(start, end - start),))]) == [True]
            assert into.numpy().tobytes() == sample_bytes(1, 0, size)[start:end]
            into.fill_(0x5A)
            assert bool((room == 0x5A).all()), "bytes outside the target were written"

    @pytest.mark.parametrize(
        "ranges", [[(10_000, 1)], [(0, 10_001)], [(9_999, 2)], [(0, 5), (10_001, 4)], [(1 << 62, 8)]]
    )
    def test_ranges_beyond_the_payload_are_never_served(self, fresh: FreshStore, ranges: list[tuple[int, int]]) -> None:
        """A miss or a refusal; never bytes of something else."""
        with fresh() as store:
            put_all(store, [sample_record(n, 10_000) for n in range(3)])
            for number in range(3):
                with suppress(InputError):
                    assert fetch(store, number, 10_000, [ByteRange(*one) for one in ranges]) is None

    @pytest.mark.parametrize("difference", [-1, 1, 4096])
    def test_a_target_of_another_size_is_never_served(self, fresh: FreshStore, difference: int) -> None:
        """A miss or a refusal, for the whole payload and for ranges."""
        with fresh() as store:
            put_all(store, [sample_record(1, 8192)])
            for ranges, length in ((None, 8192), ((ByteRange(4096, 100),), 100)):
                into = torch.zeros(max(0, length + difference), dtype=torch.uint8)
                with suppress(InputError):
                    assert store.read([ReadRequest(sample_key(1), into, ranges)]) == [False]

    def test_a_batch_is_answered_request_by_request(self, fresh: FreshStore) -> None:
        """Present, missing and repeated keys in one call; in the order asked; hits and misses are counted."""
        with fresh() as store:
            put_all(store, [sample_record(n, 5000 + n) for n in range(20)])
            asked = [3, 99, 19, 3, 0, 77, 12]
            sizes = [5000 + n if n < 20 else 64 for n in asked]
            intos = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
            before = store.stats()

            served = store.read([ReadRequest(sample_key(n), into) for n, into in zip(asked, intos, strict=True)])

            assert served == [n < 20 for n in asked]
            for number, size, into, ok in zip(asked, sizes, intos, served, strict=True):
                assert not ok or into.numpy().tobytes() == sample_bytes(number, 0, size)
            after = store.stats()
            assert (after.hits - before.hits, after.misses - before.misses) == (5, 2)
            hit_bytes = sum(size for size, ok in zip(sizes, served, strict=True) if ok)
            assert after.read_bytes - before.read_bytes == hit_bytes

    def test_empty_calls_do_nothing(self, fresh: FreshStore) -> None:
        """No records, no keys, no requests: no work and no error."""
        with fresh() as store:
            assert store.put([]) == []
            assert store.read([]) == []
            assert store.contains([]).shape == (0,)
            assert store.delete([]) == 0
            with store.lease([], owner="nobody", seconds=1) as lease:
                assert lease.keys == ()
            assert (store.stats().records, store.stats().misses) == (0, 0)

    def test_buffers_belong_to_the_caller_again(self, fresh: FreshStore) -> None:
        """After `put` and `read` return, what the caller does with its tensors does not reach the store."""
        with fresh() as store:
            record = sample_record(1, 50_000, cuts=[30_000])
            put_all(store, [record])
            for buffer in record.buffers:
                buffer.zero_()
            into = torch.zeros(50_000, dtype=torch.uint8)
            for _ in range(2):
                assert store.read([ReadRequest(sample_key(1), into)]) == [True]
                assert into.numpy().tobytes() == sample_bytes(1, 0, 50_000)
                into.zero_()
