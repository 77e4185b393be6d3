"""What a store says of itself, and whether it says that loading is worth it."""

from __future__ import annotations

import json
from typing import Any

import pytest

import kvtier
from kvtier.core.store import open_store
from kvtier.testing.stored_prompts import HOST_TIER, chunks_of, space


def test_loading_is_weighed_against_computing() -> None:
    tokens = list(range(24))
    with open_store({"tiers": [HOST_TIER]}) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        with one.match(tokens, recompute=kvtier.RecomputeRate(tokens_per_second=1e12)) as hit:
            assert (hit.tokens, hit.stored_tokens) == (0, 24)
            assert hit.load() == []
            assert hit.decision is not None
            assert hit.decision.transfer_seconds > hit.decision.recompute_seconds
        with one.match(tokens, recompute=kvtier.RecomputeRate(tokens_per_second=1.0)) as hit:
            assert hit.tokens == 24
            assert len(hit.load()) == 3
        assert one.match([5], recompute=kvtier.RecomputeRate(tokens_per_second=1.0)).decision is None
        stats = store.stats()
        assert (stats.decisions, stats.declined) == (2, 1)
        assert stats.recompute_seconds == pytest.approx(24.0, rel=1e-3)
        assert stats.rates["host"].reads == 1


def test_stats_are_plain_numbers(store_config: dict[str, Any]) -> None:
    tokens = list(range(24))
    with open_store(store_config) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        one.put(tokens, chunks_of(tokens))
        with one.match([*tokens, *range(8)]) as hit:
            hit.load(layers=[0])
        stats = store.stats()

        assert json.loads(json.dumps(stats.to_dict())) == stats.to_dict()
        assert list(stats.tiers) == [tier["name"] for tier in store_config["tiers"]]
        assert (stats.records, stats.stored_chunks, stats.existing_chunks) == (3, 3, 3)
        assert (stats.matches, stats.hits, stats.requested_tokens, stats.matched_tokens) == (1, 1, 32, 24)
        assert (stats.loaded_tokens, stats.loaded_bytes) == (24, 3 * one.codec.payload_bytes // 3)
        assert stats.tenants["default"] >= 3 * one.codec.payload_bytes
