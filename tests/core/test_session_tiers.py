"""Live sessions beside a store: what they borrow of its tiers, and what is stored meanwhile."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.core.chunks import KVChunk
from kvtier.core.compose import policy
from kvtier.core.memory import Memory
from kvtier.core.session_tiers import SessionTiers
from kvtier.core.store import Store, open_store
from kvtier.errors import CapacityError, ConfigError
from kvtier.storage_backends.base import SlotBackend
from kvtier.storage_backends.wrappers import VerifiedSlots
from kvtier.types import Budgets, KVLayout, TierName

MIB = 1 << 20
LAYOUT = KVLayout.uniform(
    num_layers=2, num_kv_heads=2, key_dim=32, value_dim=32, dtype="float32", block_tokens=16, chunk_tokens=64
)
HOST = {"name": "host", "backend": "host", "capacity": 4 * MIB}
TOKENS = list(range(1024))
KEYS = torch.randn(2, 2, 1024, 32)
CHUNKS = KVChunk.split(KEYS, KEYS + 1, 64)


def disk(path: Path, **more: Any) -> dict[str, Any]:
    return {"name": "nvme", "backend": "segment", "path": str(path), "capacity": 16 * MIB} | more


def memory_over(tiers: SessionTiers) -> Memory:
    return Memory(LAYOUT, policy("full"), Budgets(device=512 << 10), tiers)


def held(store: Store) -> int:
    return store.stats().tiers["host"].capacity_bytes


def write_and_read(backend: SlotBackend, count: int) -> None:
    slots = backend.reserve(count)
    rows = torch.randint(0, 256, (count, backend.slot_bytes), dtype=torch.uint8)
    into = torch.zeros_like(rows)
    backend.write(slots, rows)
    backend.read(slots, into)
    assert torch.equal(into, rows)


def test_a_session_takes_its_share_and_gives_it_back(tmp_path: Path) -> None:
    with open_store({"tiers": [HOST, disk(tmp_path)]}) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        space.put(TOKENS, CHUNKS)
        with closing(memory_over(store.session_tiers())) as memory:
            reports = memory.tier_reports()
            assert held(store) == 2 * MIB
            assert reports["host"].capacity == pytest.approx(2 * MIB, rel=0.01)
            assert 9 * MIB < (reports["nvme"].capacity or 0) < 16 * MIB
            with closing(memory.session()) as session:
                for start in range(0, 5120, 128):
                    positions = torch.arange(start, start + 128)[None]
                    for layer in range(2):
                        kv = torch.randn(1, 2, 128, 32)
                        session.append(layer, kv, kv, positions)
                assert memory.tier_reports()["nvme"].used > 0, "more than the device and the host hold"
            with space.match(TOKENS) as hit:
                loaded = hit.load()
            assert len(loaded) == 16
            assert torch.equal(torch.cat([chunk.k for chunk in loaded], 2), KEYS)  # type: ignore[arg-type]
        assert held(store) == 4 * MIB


def test_slots_in_segments_share_the_capacity_and_are_verified(tmp_path: Path) -> None:
    with open_store({"tiers": [disk(tmp_path, segment_bytes="512KiB")]}) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        space.put(TOKENS, CHUNKS)
        with closing(store.session_tiers()) as tiers:
            assert list(tiers.capacities) == ["nvme"]
            with tiers.open("nvme", 8192, 8 * MIB) as backend:
                assert isinstance(backend, VerifiedSlots)
                write_and_read(backend, 256)
                stats = store.stats().tiers["nvme"]
                assert stats.held_bytes <= stats.capacity_bytes == 16 * MIB
                with space.match(TOKENS) as hit:
                    assert len(hit.load()) == 16


def test_the_share_is_handed_out_once() -> None:
    with open_store({"tiers": [HOST | {"sessions": "1MiB"}]}) as store:
        first = store.session_tiers(host_bytes=768 << 10)
        with pytest.raises(ConfigError, match=r"live sessions may take 256\.0 KiB more of the host tier, required 512"):
            store.session_tiers(host_bytes=512 << 10)
        second = store.session_tiers()
        assert (first.capacities, second.capacities) == ({"host": 768 << 10}, {"host": 256 << 10})
        with pytest.raises(ConfigError, match="required some"):
            store.session_tiers()
        first.close()
        first.close()
        assert held(store) == 3 * MIB
        with closing(store.session_tiers()) as third:
            assert third.capacities == {"host": 768 << 10}
        second.close()
        assert held(store) == 4 * MIB


def test_what_hits_hold_is_not_lent() -> None:
    with open_store({"tiers": [HOST | {"capacity": 2 * MIB}]}) as store:
        space = store.namespace(model="m", layout=LAYOUT)
        space.put(TOKENS, CHUNKS)
        with space.match(TOKENS) as hit:
            assert hit.tokens > 512
            with pytest.raises(CapacityError, match="release the hits that hold them"):
                store.session_tiers()
        store.session_tiers().close()


def test_nothing_is_borrowed_where_nothing_is_lent(tmp_path: Path) -> None:
    files = {"name": "nvme", "backend": "files", "path": str(tmp_path / "files"), "capacity": MIB}
    with open_store({"tiers": [files]}) as store, closing(store.session_tiers()) as tiers:
        assert tiers.capacities == {}
    with open_store({"tiers": [disk(tmp_path / "segments")]}):
        pass
    with (
        open_store({"tiers": [HOST, disk(tmp_path / "segments")]}, read_only=True) as store,
        closing(store.session_tiers()) as tiers,
    ):
        assert list(tiers.capacities) == ["host"]


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_a_share_that_holds_no_page_is_refused(tmp_path: Path, tier: TierName) -> None:
    with (
        open_store({"tiers": [HOST, disk(tmp_path)]}) as store,
        closing(store.session_tiers()) as tiers,
        pytest.raises(
            ConfigError, match=rf"the {tier} tier must hold at least one page \(8\.0 KiB\), got 100 B for it"
        ),
    ):
        tiers.open(tier, 8192, 100)
