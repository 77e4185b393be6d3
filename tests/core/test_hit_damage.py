"""A bit flipped in host memory: its chunk and all behind it are withheld, wherever it lies and however one loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvtier.core.chunks import KVChunk
from kvtier.core.namespace import Namespace
from kvtier.core.store import Store, open_store
from kvtier.storage_backends.extents import EXTENT_BYTES
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.records import ReadRequest
from kvtier.testing.faults.memory import host_memory
from kvtier.types import KVLayout

LAYOUT = KVLayout.uniform(
    num_layers=5, num_kv_heads=2, key_dim=32, value_dim=32, dtype="float32", page_tokens=16, chunk_tokens=64
)
CHUNKS, CHUNK = 4, 64
PAYLOAD = 5 * EXTENT_BYTES // 2
TOKENS = range(CHUNKS * CHUNK)

first_middle_last = pytest.mark.parametrize("bit", [0, 8 * EXTENT_BYTES + 4321, 8 * PAYLOAD - 1])
any_chunk = pytest.mark.parametrize("place", [0, 2, CHUNKS - 1])


def chunks() -> list[KVChunk]:
    k = torch.arange(5 * 2 * CHUNKS * CHUNK * 32, dtype=torch.float32).view(5, 2, CHUNKS * CHUNK, 32)
    return KVChunk.split(k, -k, CHUNK)


@contextmanager
def damaged(place: int, bit: int) -> Iterator[tuple[Store, Namespace, HostRecords]]:
    """A store in whose chunk ``place`` a bit is not what it was; nobody knows yet."""
    with open_store({"tiers": [{"name": "host", "backend": "host", "capacity": "8MiB", "sessions": "1MiB"}]}) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        assert space.put(TOKENS, chunks()).stored == CHUNKS
        host = store.tiers[0]
        assert isinstance(host, HostRecords)
        assert [info.payload_bytes for info in host.scan()] == [PAYLOAD] * CHUNKS
        key = [info.key for info in host.scan()][place]
        host_memory(host, key)[0][bit // 8] ^= 1 << bit % 8
        yield store, space, host


@first_middle_last
@any_chunk
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("step", [1 << 14, 1 << 20])
def test_a_load_into_place_ends_before_it(
    place: int, bit: int, threads: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.core.chunks._STEP_BYTES", step)
    monkeypatch.setattr("kvtier.storage_backends.workers._WORTH_BYTES", 1)
    with damaged(place, bit) as (store, space, host), space.match(TOKENS) as hit:
        monkeypatch.setattr(store.workers, "threads", threads)
        into = [KVChunk(torch.zeros(5, 2, CHUNK, 32), torch.zeros(5, 2, CHUNK, 32)) for _ in range(CHUNKS)]

        found = hit.load(into=into)

        assert len(found) == place
        for got, put in zip(found, chunks(), strict=False):
            assert torch.equal(torch.as_tensor(got.k), torch.as_tensor(put.k))
            assert torch.equal(torch.as_tensor(got.v), torch.as_tensor(put.v))
        stats = store.stats()
        assert (stats.loaded_tokens, stats.short_loads) == (place * CHUNK, 1)
        assert (host.stats().damaged, host.stats().records) == (1, CHUNKS - 1)
        assert space.match(TOKENS).stored_tokens == place * CHUNK, "it was put aside"
        assert len(hit.load(into=into)) == place


@first_middle_last
@any_chunk
def test_a_load_of_some_layers_ends_before_it(place: int, bit: int) -> None:
    """Layers 0, 2 and 4 touch all three extents."""
    with damaged(place, bit) as (store, space, host), space.match(TOKENS) as hit:
        found = hit.load(layers=[0, 2, 4])

        assert len(found) == place
        assert all(torch.equal(got.k[1], put.k[2]) for got, put in zip(found, chunks(), strict=False))
        assert (store.stats().loaded_tokens, host.stats().damaged) == (place * CHUNK, 1)


@first_middle_last
@any_chunk
def test_of_a_batch_it_alone_is_a_miss(place: int, bit: int) -> None:
    with damaged(place, bit) as (_, _, host):
        keys = [info.key for info in host.scan()]
        into = torch.zeros(CHUNKS, PAYLOAD, dtype=torch.uint8)
        before = host.stats()

        served = host.read([ReadRequest(key, row) for key, row in zip(keys, into, strict=True)])

        right = [number != place for number in range(CHUNKS)]
        after = host.stats()
        assert served == host.contains(keys).tolist() == right
        assert (after.damaged, after.misses - before.misses, after.hits - before.hits) == (1, 1, CHUNKS - 1)
        assert after.read_bytes - before.read_bytes == (CHUNKS - 1) * PAYLOAD
