"""Damage under a store: loads get shorter, never wrong, whichever tier is hurt, and nothing is raised."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest  # noqa: TC002 - hypothesis reads annotations
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.core.chunks import KVChunk
from kvtier.core.store import Store, open_store
from kvtier.storage_backends.host_records import HostRecords
from kvtier.testing.faults.files import damage_files
from kvtier.testing.faults.memory import host_memory
from kvtier.types import KVLayout

MIB = 1 << 20
LAYOUT = KVLayout.uniform(
    num_layers=2,
    num_kv_heads=2,
    key_dim=64,
    value_dim=64,
    dtype="float32",
    page_tokens=4,
    block_tokens=4,
    chunk_tokens=64,
)
TOKENS = list(range(512))
KEYS = torch.arange(2 * 2 * 512 * 64, dtype=torch.float32).view(2, 2, 512, 64)
CHUNKS = KVChunk.split(KEYS, -KEYS, 64)
CALM = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=15
)


def config(path: Path, backend: str) -> dict[str, Any]:
    return {
        "durability": "relaxed",
        "tiers": [
            {"name": "host", "backend": "host", "capacity": 8 * MIB},
            {"name": "nvme", "backend": backend, "path": str(path), "capacity": 16 * MIB},
        ],
    }


def hurt_host(store: Store, rng: random.Random) -> int:
    """Change a bit of a copy in memory; the chunk it belongs to."""
    host = store.tiers[0]
    assert isinstance(host, HostRecords)
    number, key = rng.choice([*enumerate(store.namespace(model="m", layout=LAYOUT).keys(TOKENS))])
    view = host_memory(host, key)[0]
    view[rng.randrange(LAYOUT.token_bytes * 64) % view.size] ^= 1 << rng.randrange(8)
    return number


def assert_right(chunks: list[KVChunk]) -> None:
    for found, expected in zip(chunks, CHUNKS, strict=False):
        assert torch.equal(found.k, expected.k)  # type: ignore[arg-type]
        assert torch.equal(found.v, expected.v)  # type: ignore[arg-type]


@CALM
@given(seed=st.integers(0, 2**32 - 1))
def test_damage_in_memory_alone_shortens_the_load(seed: int) -> None:
    with open_store({"tiers": [{"name": "host", "backend": "host", "capacity": 8 * MIB}]}) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        assert space.put(TOKENS, CHUNKS).stored == 8
        number = hurt_host(store, random.Random(seed))

        with space.match(TOKENS) as hit:
            loaded = hit.load()

        assert (hit.tokens, len(loaded)) == (512, number)
        assert_right(loaded)
        stats = store.stats()
        assert (stats.short_loads, stats.tiers["host"].damaged) == (1, 1)
        assert space.match(TOKENS).tokens == 64 * number
        assert space.put(TOKENS, CHUNKS).stored == 1, "what was lost is stored again"


@CALM
@given(seed=st.integers(0, 2**32 - 1), backend=st.sampled_from(["segment", "files"]))
def test_damage_in_memory_over_a_disk_costs_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, backend: str
) -> None:
    with open_store(config(tmp_path_factory.mktemp("store"), backend)) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        space.put(TOKENS, CHUNKS)
        hurt_host(store, random.Random(seed))

        for damaged in (1, 1):
            with space.match(TOKENS) as hit:
                loaded = hit.load()
            assert len(loaded) == 8
            assert_right(loaded)
            assert store.stats().tiers["host"].damaged == damaged
        assert store.stats().promoted_bytes == LAYOUT.token_bytes * 64, "the copy was mended"


@CALM
@given(seed=st.integers(0, 2**32 - 1), hurts=st.integers(1, 3), backend=st.sampled_from(["segment", "files"]))
def test_damage_on_disk_shortens_the_load(
    tmp_path_factory: pytest.TempPathFactory, seed: int, hurts: int, backend: str
) -> None:
    """Any damage to any file, while the store is closed and then while it is open."""
    rng = random.Random(seed)
    directory = tmp_path_factory.mktemp("store")
    settings_ = config(directory, backend)
    with open_store(settings_) as store:
        store.namespace(model="m", layout=LAYOUT).put(TOKENS, CHUNKS)
    for _ in range(hurts):
        damage_files(directory, rng)
    with open_store(settings_) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        with space.match(TOKENS) as hit:
            assert_right(hit.load(layers=range(2)))
        store.tiers[0].clear()
        damage_files(directory, rng)
        with space.match(TOKENS) as hit:
            loaded = hit.load()
            assert len(loaded) <= hit.tokens // 64
            assert_right(loaded)
        space.put(TOKENS, CHUNKS)
        with space.match(TOKENS) as hit:
            assert_right(hit.load())


def test_a_disk_that_is_full_of_others_keeps_copies_in_memory(tmp_path: Path) -> None:
    tiers = config(tmp_path, "segment")["tiers"]
    with open_store({"tiers": [tiers[0], tiers[1] | {"capacity": 4 * MIB, "segment_bytes": "256KiB"}]}) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        hits = []
        for number in range(40):
            prompt = [number] * 512
            report = space.put(prompt, CHUNKS)
            hits.append(space.match(prompt))
            if report.volatile:
                break

        assert 0 < report.volatile <= report.stored
        assert "the capacity is used up" in report.reason
        assert store.stats().volatile_chunks == report.volatile
        loaded = hits[-1].load()
        assert len(loaded) == report.stored
        assert_right(loaded)
        for hit in hits:
            hit.release()
        assert space.put([101] * 512, CHUNKS).volatile == 0
