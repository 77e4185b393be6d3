"""Records in host memory leave in the order of any placer, and what an order forgot costs no memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier import registry
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.order import LeastRecentlyUsed
from kvtier.storage_backends.records import ReadRequest, Record
from kvtier.testing.placement_laws import SmallTier, Step, Trace, traces

NAMES = ["lru", "arc", "s3fifo", "lfu"]
PLACERS = st.sampled_from(NAMES).map(registry.policies.resolve)
PAYLOAD = torch.arange(1 << 16).to(torch.uint8)


class RecordTier:
    """A host tier with room for so many records; ``SmallTier`` is the same over numbers."""

    def __init__(self, placer: type, capacity: int) -> None:
        self.order = placer().order()
        self.store = HostRecords(-(-capacity * PAYLOAD.numel() * 32 // 31), order=self.order)
        self.left: list[int] = []

    def held(self) -> set[int]:
        return {int.from_bytes(info.key, "big") for info in self.store.scan()}

    def step(self, step: Step) -> None:
        before, key = self.held(), key_of(step.used[0])
        with self.store.lease(list(map(key_of, step.protected)), owner="test", seconds=60):
            if step.used[0] in before:
                into = torch.empty_like(PAYLOAD)
                assert self.store.read([ReadRequest(key, into)]) == [True]
                assert into.equal(PAYLOAD)
            else:
                self.store.put([Record(key=key, namespace=bytes(32), buffers=[PAYLOAD])])
        self.left += sorted(before - self.held())
        self.store.delete(list(map(key_of, step.deleted)))


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


@given(trace=traces(batch=1, protect=False, delete=False), placer=PLACERS)
def test_records_leave_as_their_numbers_would(trace: Trace, placer: type) -> None:
    numbers = SmallTier(placer().order(), trace.capacity).run(trace)
    records = RecordTier(placer, trace.capacity)
    for step in trace.steps:
        records.step(step)

    assert records.left == numbers.left
    assert records.held() == numbers.held


@given(trace=traces(batch=1), placer=PLACERS)
def test_an_order_knows_what_is_there(trace: Trace, placer: type) -> None:
    tier = RecordTier(placer, trace.capacity)
    for step in trace.steps:
        tier.step(step)

        held = tier.held()
        assert tier.store.stats().records == tier.order.residents == len(held) <= trace.capacity
        assert sorted(map(tier.store._index.key, tier.store._index.candidates())) == sorted(map(key_of, held))


@pytest.mark.parametrize("name", NAMES)
def test_what_an_order_forgot_costs_nothing(name: str) -> None:
    tier = RecordTier(registry.policies.resolve(name), 50)
    for number in range(1500):
        tier.store.put([Record(key=key_of(number), namespace=bytes(32), buffers=[PAYLOAD[:8192], PAYLOAD[8192:]])])

    assert tier.order.residents == 50
    assert tier.store._index._table.count <= 2 * 50 + 65
    assert tier.store._index._table.held_bytes < 64_000


@pytest.mark.parametrize(("name", "survives"), [("lru", False), ("arc", True), ("s3fifo", True), ("lfu", True)])
def test_a_hot_record_survives_a_scan(name: str, survives: bool) -> None:
    order = registry.policies.resolve(name)().order()
    payload = torch.zeros(100_000, dtype=torch.uint8)
    with HostRecords(4 << 20, order=order) as store:
        hot = b"h" * 32
        for number in range(120):
            if number in (0, 1, 2, 3):
                store.put([Record(key=hot, namespace=bytes(32), buffers=[payload])])
                assert store.read([ReadRequest(hot, payload.clone())]) == [True]
            store.put([Record(key=key_of(number), namespace=bytes(32), buffers=[payload])])

        assert store.contains([hot]).tolist() == [survives]
        assert store.stats().records == order.residents < 121


def test_the_default_is_least_recently_used() -> None:
    assert isinstance(registry.policies.resolve("lru")().order(), LeastRecentlyUsed)
