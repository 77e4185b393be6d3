"""Orders over keys: the same victims as over ids, and no memory for keys that are forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier import registry
from kvtier.policies.placement.s3fifo import S3FIFO
from kvtier.storage_backends.eviction import KeyedOrder
from kvtier.testing.placement_laws import SmallTier, Step, Trace, traces

PLACERS = st.sampled_from(["lru", "arc", "s3fifo", "lfu"]).map(registry.policies.resolve)


class KeyedTier:
    """A tier over keys; ``SmallTier`` is the same over numbers."""

    def __init__(self, order: KeyedOrder[bytes], capacity: int, *, tells_misses: bool = True) -> None:
        self.order, self.capacity, self.tells_misses = order, capacity, tells_misses
        self.held: set[bytes] = set()
        self.left: list[bytes] = []

    def step(self, step: Step) -> None:
        key, protected = b"%d" % step.used[0], {b"%d" % index for index in (*step.protected, *step.used)}
        if key in self.held:
            self.order.used(key)
        else:
            if self.tells_misses:
                self.order.missed(key)
            if len(self.held) == self.capacity:
                self.evict_one(protected)
            if len(self.held) < self.capacity:
                self.order.added(key, 100)
                self.held.add(key)
        for index in step.deleted:
            self.order.removed(b"%d" % index, evicted=False)
            self.held.discard(b"%d" % index)

    def evict_one(self, protected: set[bytes]) -> None:
        victim = next((key for key in self.order.candidates() if key not in protected), None)
        if victim is not None:
            self.order.removed(victim, evicted=True)
            self.held.remove(victim)
            self.left.append(victim)


@given(trace=traces(batch=1, protect=False), placer=PLACERS)
def test_keys_leave_as_their_numbers_would(trace: Trace, placer: type) -> None:
    numbers = SmallTier(placer().order(), trace.capacity).run(trace)
    keys = KeyedTier(KeyedOrder(placer().order()), trace.capacity)
    for step in trace.steps:
        keys.step(step)

    assert len(keys.order) == len(keys.held)
    if placer is not S3FIFO:  # which moves its hand by as many as it is asked for
        assert [int(key) for key in keys.left] == numbers.left
        assert {int(key) for key in keys.held} == numbers.held


@given(trace=traces(batch=1), placer=PLACERS, tells=st.booleans())
def test_candidates_are_all_that_is_there_once(trace: Trace, placer: type, tells: bool) -> None:
    tier = KeyedTier(KeyedOrder(placer().order()), trace.capacity, tells_misses=tells)
    for step in trace.steps:
        tier.step(step)

        assert sorted(tier.order.candidates()) == sorted(tier.held)
        assert len(tier.held) <= trace.capacity


@pytest.mark.parametrize("name", ["lru", "arc", "s3fifo", "lfu"])
def test_more_candidates_than_are_asked_for_at_once(name: str) -> None:
    order: KeyedOrder[int] = KeyedOrder(registry.policies.resolve(name)().order())
    for index in range(200):
        order.added(index)
    for index in range(0, 200, 3):
        order.used(index)
        order.used(index)

    assert sorted(order.candidates()) == list(range(200))


@pytest.mark.parametrize("name", ["lru", "arc", "s3fifo", "lfu"])
def test_keys_that_are_forgotten_cost_nothing(name: str) -> None:
    order: KeyedOrder[tuple[int, str]] = KeyedOrder(registry.policies.resolve(name)().order())
    for index in range(2000):
        if index >= 50:
            order.removed(next(order.candidates()), evicted=True)
        order.added((index, "key"))

    assert len(order) == 50
    assert order.known <= 2 * 50 + 65


def test_unknown_keys_are_ignored() -> None:
    order: KeyedOrder[bytes] = KeyedOrder(registry.policies.resolve("lru")().order())
    order.used(b"nowhere")
    order.missed(b"nowhere")
    order.removed(b"nowhere", evicted=True)
    order.removed(b"nowhere", evicted=False)

    assert order.known == len(order) == 0
    assert list(order.candidates()) == []
