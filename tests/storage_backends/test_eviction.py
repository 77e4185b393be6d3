"""Orders over keys: the same victims as over ids, and no memory for keys that are forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier import registry
from kvtier.storage_backends.eviction import KeyedOrder
from kvtier.testing.placement_laws import SmallTier, Trace, traces

PLACERS = st.sampled_from(["lru", "arc", "s3fifo", "lfu"]).map(registry.policies.resolve)


class KeyedTier:
    def __init__(self, order: KeyedOrder[bytes], capacity: int) -> None:
        self.order, self.capacity = order, capacity
        self.held: set[bytes] = set()
        self.left: list[bytes] = []

    def run(self, trace: Trace) -> None:
        for step in trace.steps:
            used = [b"%d" % index for index in step.used]
            missing = [key for key in used if key not in self.held]
            self.order.hit([key for key in used if key in self.held])
            self.order.miss(missing)
            short = len(self.held) + len(missing) - self.capacity
            victims = self.order.victims(max(0, short), {*used, *(b"%d" % index for index in step.protected)})
            self.order.evict(victims)
            self.held -= set(victims)
            self.left += victims
            admitted = missing[: self.capacity - len(self.held)]
            self.order.admit(admitted)
            self.held |= set(admitted)
            deleted = [b"%d" % index for index in step.deleted]
            self.order.forget(deleted)
            self.held -= set(deleted)


@given(trace=traces(), placer=PLACERS)
def test_keys_leave_as_their_numbers_would(trace: Trace, placer: type) -> None:
    numbers = SmallTier(placer().order(), trace.capacity).run(trace)
    keys = KeyedTier(KeyedOrder(placer().order()), trace.capacity)
    keys.run(trace)

    assert [int(key) for key in keys.left] == numbers.left
    assert {int(key) for key in keys.held} == numbers.held
    assert len(keys.order) == len(keys.held)


@pytest.mark.parametrize("name", ["lru", "arc", "s3fifo", "lfu"])
def test_keys_that_are_forgotten_cost_nothing(name: str) -> None:
    order: KeyedOrder[tuple[int, str]] = KeyedOrder(registry.policies.resolve(name)().order())
    for index in range(2000):
        if index >= 50:
            order.evict(order.victims(1))
        order.admit([(index, "key")])

    assert len(order) == 50
    assert order.known <= 2 * 50 + 65


def test_unknown_keys_are_ignored() -> None:
    order: KeyedOrder[bytes] = KeyedOrder(registry.policies.resolve("lru")().order())
    for call in (order.hit, order.miss, order.evict, order.forget):
        call([b"nowhere"])

    assert order.known == len(order) == 0
    assert order.victims(3) == []
