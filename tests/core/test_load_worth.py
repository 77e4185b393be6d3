"""Load or compute again: the best prefix by exhaustive search, and the borders where nothing or all is loaded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.load_worth import RecomputeRate, StoredPrefix, decide
from kvtier.errors import InputError
from kvtier.storage_backends.rates import TransferRate

CHUNK_BYTES, CHUNK_TOKENS = 1 << 20, 256
RATES = st.builds(TransferRate, latency=st.floats(0, 0.1), bandwidth=st.floats(1e6, 1e11))
RECOMPUTE = st.builds(
    RecomputeRate,
    tokens_per_second=st.floats(1, 1e6),
    attention_pairs_per_second=st.none() | st.floats(1e3, 1e10),
)


def prefix(tiers: list[int]) -> StoredPrefix:
    return StoredPrefix(tiers=tiers, chunk_bytes=CHUNK_BYTES, chunk_tokens=CHUNK_TOKENS)


@given(tiers=st.lists(st.integers(0, 1), min_size=1, max_size=20), rates=st.tuples(RATES, RATES), recompute=RECOMPUTE)
def test_the_prefix_that_saves_most_is_chosen(
    tiers: list[int], rates: tuple[TransferRate, TransferRate], recompute: RecomputeRate
) -> None:
    decoding = TransferRate(latency=0.0, bandwidth=5e9)
    decision = decide(prefix(tiers), recompute, rates, decoding)

    def transfer(count: int) -> float:
        read = sum(rates[tier].predict(CHUNK_BYTES * tiers[:count].count(tier)) for tier in (0, 1))
        return read + count * CHUNK_BYTES / 5e9

    def saved(count: int) -> float:
        return recompute.seconds(count * CHUNK_TOKENS) - transfer(count)

    count = decision.tokens // CHUNK_TOKENS
    best = max(saved(n) for n in range(len(tiers) + 1))
    assert decision.stored_tokens == len(tiers) * CHUNK_TOKENS
    assert saved(count) == pytest.approx(best, rel=1e-6, abs=1e-9)
    told = count or len(tiers)
    assert decision.transfer_seconds == pytest.approx(transfer(told), rel=1e-6)
    assert decision.recompute_seconds == pytest.approx(recompute.seconds(told * CHUNK_TOKENS))


def test_a_slow_model_loads_and_a_fast_one_computes() -> None:
    rates = [TransferRate(latency=1e-4, bandwidth=1e9)]
    decoding = TransferRate(latency=0.0, bandwidth=1e10)
    slow, fast = RecomputeRate(tokens_per_second=1000), RecomputeRate(tokens_per_second=1e9)

    assert decide(prefix([0] * 8), slow, rates, decoding).tokens == 8 * CHUNK_TOKENS
    assert decide(prefix([0] * 8), fast, rates, decoding).tokens == 0


def test_only_the_fast_part_may_be_worth_it() -> None:
    rates = [TransferRate(latency=1e-5, bandwidth=1e10), TransferRate(latency=1.0, bandwidth=1e6)]
    decoding = TransferRate(latency=0.0, bandwidth=1e10)

    decision = decide(prefix([0, 0, 0, 1, 1]), RecomputeRate(tokens_per_second=5000), rates, decoding)

    assert decision.tokens == 3 * CHUNK_TOKENS


def test_attention_grows_with_the_square() -> None:
    rate = RecomputeRate(tokens_per_second=100, attention_pairs_per_second=1000)

    assert rate.seconds(0) == 0
    assert rate.seconds(10) == pytest.approx(0.1 + 55 / 1000)


@pytest.mark.parametrize("bad", [{"tokens_per_second": 0}, {"tokens_per_second": 1, "attention_pairs_per_second": -1}])
def test_rates_are_more_than_nothing(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be more than 0, got"):
        RecomputeRate(**bad)
