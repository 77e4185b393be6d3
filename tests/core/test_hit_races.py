"""Loads from host memory while records are evicted, deleted and replaced: fewer chunks, never a wrong byte."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from kvtier.core.chunks import ChunkCodec, KVChunk
from kvtier.core.store import Store, open_store
from kvtier.storage_backends.host_records import HostRecords
from kvtier.types import KVLayout

MIB = 1 << 20
LAYOUT = KVLayout.uniform(
    num_layers=4, num_kv_heads=2, key_dim=32, value_dim=32, dtype="float32", page_tokens=16, chunk_tokens=64
)
CHUNK = 64
LENGTH = 10


def tokens_of(number: int) -> list[int]:
    return [number * 10_000 + token for token in range(LENGTH * CHUNK)]


def chunks_of(number: int) -> list[KVChunk]:
    """Every element says whose it is and where it stands."""
    k = torch.arange(4 * 2 * LENGTH * CHUNK * 32, dtype=torch.float32).view(4, 2, LENGTH * CHUNK, 32)
    return KVChunk.split(k + number, -k - number, CHUNK)


def same(found: Sequence[KVChunk], number: int) -> bool:
    return all(
        torch.equal(torch.as_tensor(one.k), torch.as_tensor(two.k))
        and torch.equal(torch.as_tensor(one.v), torch.as_tensor(two.v))
        for one, two in zip(found, chunks_of(number), strict=False)
    )


def opened(capacity: int) -> Store:
    return open_store({"tiers": [{"name": "host", "backend": "host", "capacity": capacity, "sessions": MIB}]})


@pytest.mark.parametrize("how", ["delete", "evict"])
def test_what_goes_while_it_is_decoded_is_decoded_to_its_end(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step of every chunk its record goes, and others want its memory."""
    monkeypatch.setattr("kvtier.core.chunks._STEP_BYTES", 1 << 14)
    with opened(6 * MIB) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        space.put(tokens_of(0), chunks_of(0)[:1])
        anchor = space.match(tokens_of(0))  # memory that is wholly free would go back to the system
        space.put(tokens_of(1), chunks_of(1))
        hit = space.match(tokens_of(1))
        hit.release()
        decoding, turn = ChunkCodec.decoding, iter(range(2, 1000))

        def disturbed(codec: ChunkCodec, payload: torch.Tensor, layers: Sequence[int], into: KVChunk) -> Iterator[int]:
            for stop in decoding(codec, payload, layers, into):
                if how == "delete":
                    space.delete(tokens_of(1))
                number = next(turn)
                space.put(tokens_of(number), chunks_of(number))
                space.put(tokens_of(-number), chunks_of(-number))
                yield stop

        monkeypatch.setattr(ChunkCodec, "decoding", disturbed)
        monkeypatch.setattr(store.workers, "threads", 1)
        found = hit.load()

        assert len(found) == LENGTH
        assert same(found, 1)
        assert next(turn) > 2 + 2 * LENGTH, "several steps a chunk"
        anchor.release()
        store.clear()
        host = store.tiers[0]
        assert isinstance(host, HostRecords)
        assert host.stats().damaged == 0
        assert host._arena.held_bytes == 0, "what nobody reads any more is given back"


def test_loads_race_with_puts_and_deletes() -> None:
    """Threads load into tensors of their own what other threads evict, delete and put again."""
    problems: list[str] = []
    loaded = [0] * 3
    with opened(5 * MIB) as store:
        space = store.namespace(model="m", layout=LAYOUT)

        def load(worker: int) -> None:
            draw, into = (
                random.Random(worker),
                [KVChunk(*map(torch.clone, map(torch.as_tensor, c))) for c in chunks_of(0)],
            )
            for _ in range(60):
                number = draw.randrange(6)
                hit = space.match(tokens_of(number))
                hit.release()  # so that nothing keeps the records but the load itself
                found = hit.load(into=into)
                loaded[worker] += len(found)
                if not same(found, number):
                    problems.append(f"thread {worker} got wrong bytes of {number}")

        def churn() -> None:
            draw = random.Random(99)
            for _ in range(120):
                number = draw.randrange(6)
                space.put(tokens_of(number), chunks_of(number))
                if draw.random() < 0.3:
                    space.delete(tokens_of(draw.randrange(6)))

        threads = [threading.Thread(target=load, args=(worker,)) for worker in range(3)]
        threads += [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert problems == []
        assert min(loaded) > 0
        assert store.stats().tiers["host"].damaged == 0
