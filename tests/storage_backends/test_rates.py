"""Rates: they find the latency and bandwidth of whatever transfers, and are never beside themselves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.storage_backends.rates import TransferRate

MIB = 1 << 20


@pytest.mark.parametrize(("latency", "bandwidth"), [(1e-4, 1e9), (5e-3, 2e8), (1e-5, 2e10)])
def test_the_truth_is_found_from_a_wrong_start(latency: float, bandwidth: float) -> None:
    rng = random.Random(0)
    rate = TransferRate(latency=1e-3, bandwidth=1e8)
    for _ in range(400):
        nbytes = rng.choice([4096, 64 << 10, MIB, 64 * MIB])
        rate.learn(nbytes, latency + nbytes / bandwidth)

    for nbytes in (MIB, 64 * MIB, 1 << 30):
        assert rate.predict(nbytes) == pytest.approx(latency + nbytes / bandwidth, rel=0.35)
    assert rate.transfers == 400


@given(transfers=st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e6)), max_size=50))
def test_predictions_stay_finite_and_grow_with_size(transfers: list[tuple[int, float]]) -> None:
    rate = TransferRate(latency=1e-4, bandwidth=1e9)
    for nbytes, seconds in transfers:
        rate.learn(nbytes, seconds)

    predictions = [rate.predict(nbytes) for nbytes in (0, 1, MIB, 1 << 40)]
    assert predictions[0] == 0
    assert predictions == sorted(predictions)
    assert all(0 <= prediction < float("inf") for prediction in predictions)
    assert rate.bandwidth > 0
    assert rate.latency >= 0


def test_what_took_no_time_teaches_nothing() -> None:
    rate = TransferRate(latency=1e-4, bandwidth=1e9)
    for nbytes, seconds in ((0, 1.0), (MIB, 0.0)):
        rate.learn(nbytes, seconds)

    assert (rate.transfers, rate.latency, rate.bandwidth) == (0, 1e-4, pytest.approx(1e9))
