"""What a store does when room is short: leases, the beginning of long prompts, and no memory to move through."""

import pytest

from kvtier.core.store import open_store
from kvtier.errors import CapacityError
from kvtier.storage_backends.memory import PinnedRegion
from kvtier.testing.stored_prompts import HOST_TIER, assert_loaded, chunks_of, space

MIB = 1 << 20


def test_hits_are_leased_until_they_are_released() -> None:
    tokens = list(range(80))
    with open_store({"tiers": [HOST_TIER | {"capacity": 2 * MIB}]}) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        held = one.match(tokens, owner="me")
        assert store.stats().tiers["host"].leased_bytes > 0
        assert held.lease.owner == "me"
        for start in range(1000, 4000, 8):
            other = list(range(start, start + 8))
            one.put(other, chunks_of(other))
        assert_loaded(held.load(), tokens)
        assert len(held.load()) == 10
        held.release()
        held.release()
        assert store.stats().tiers["host"].leased_bytes == 0
        for start in range(4000, 8000, 8):
            other = list(range(start, start + 8))
            one.put(other, chunks_of(other))
        assert one.match(tokens).tokens < 80
        assert len(held.load()) < 10, "what is gone makes a load shorter"
        assert store.stats().short_loads == 1


def test_a_prompt_larger_than_the_store_keeps_its_beginning() -> None:
    tokens = list(range(4000))
    with open_store({"tiers": [HOST_TIER | {"capacity": 256 << 10}]}) as store:
        report = space(store).put(tokens, chunks_of(tokens))

        assert 0 < report.stored < 500
        assert report.stored + report.refused == 500
        assert "no room" in report.reason
        with space(store).match(tokens) as hit:
            assert hit.tokens == 8 * report.stored
            assert_loaded(hit.load(), tokens)
        assert store.stats().last_refusal == report.reason


def test_no_memory_to_move_through_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_self: PinnedRegion, _size: int) -> None:
        raise CapacityError("required memory, which the system refused")

    tokens = list(range(24))
    with open_store({"tiers": [HOST_TIER]}) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        store.staging.close()
        monkeypatch.setattr(PinnedRegion, "__init__", none_left)

        assert one.put([5] * 8, chunks_of([5] * 8)) == (0, 0, 1, "required memory, which the system refused", 0)
        with one.match(tokens) as hit:
            assert hit.load(layers=[0]) == []
            assert len(hit.load()) == 3, "whole chunks in memory need no way"
