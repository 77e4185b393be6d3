"""The laws of placement policies: subclass `PlacementLaws` in a test file and they run on your policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from kvtier.core.policy import PlacementPolicy
from kvtier.storage_backends.eviction import EvictionOrder, IdArray
from kvtier.testing.law import PolicyLaws, claimed, law, require

__all__ = ["PlacementLaws", "SmallTier", "Step", "Trace", "traces"]

_IDS = 12


@dataclass(frozen=True)
class Step:
    """Ids used together, those that may not leave meanwhile, and those deleted afterwards."""

    used: tuple[int, ...]
    protected: frozenset[int] = frozenset()
    deleted: tuple[int, ...] = ()

    def describe(self) -> str:
        """What happens, in words."""
        guarded = f" while {_list(self.protected)} may not leave" if self.protected else ""
        gone = f", delete {_list(self.deleted)}" if self.deleted else ""
        return f"use {_list(self.used)}{guarded}{gone}"


@dataclass(frozen=True)
class Trace:
    """What happens to a tier with room for ``capacity`` ids."""

    capacity: int
    steps: tuple[Step, ...]

    def describe(self) -> str:
        """What happens, in words."""
        return f"a tier of {self.capacity}: " + "; ".join(step.describe() for step in self.steps)


@st.composite
def traces(draw: st.DrawFn, *, most: int = 40, batch: int = 3, protect: bool = True, delete: bool = True) -> Trace:
    """Traces of up to ``most`` steps over a few ids, in tiers of up to 8."""
    capacity = draw(st.integers(1, 8))
    ids = st.integers(0, _IDS - 1)
    step = st.builds(
        Step,
        st.lists(ids, min_size=1, max_size=min(batch, capacity), unique=True).map(tuple),
        st.frozensets(ids, max_size=3) if protect else st.just(frozenset()),
        st.lists(ids, max_size=2, unique=True).map(tuple) if delete else st.just(()),
    )
    return Trace(capacity, tuple(draw(st.lists(step, max_size=most))))


@dataclass
class SmallTier:
    """A tier of ``capacity`` ids that asks an order for victims, as the tiers of kvtier do.

    Attributes
    ----------
    held : set of int
        What is in it.
    left : list of int
        What left to make room, in order.
    """

    order: EvictionOrder
    capacity: int
    held: set[int] = field(default_factory=set)
    left: list[int] = field(default_factory=list)

    def run(self, trace: Trace) -> SmallTier:
        """Let a trace happen."""
        for step in trace.steps:
            self.step(step)
        return self

    def step(self, step: Step) -> None:
        """Use, make room, admit what fits, delete; each answer of the order is checked."""
        missing = [index for index in step.used if index not in self.held]
        self.order.hit(ids_of(index for index in step.used if index in self.held))
        self.order.miss(ids_of(missing))
        self.make_room(len(self.held) + len(missing) - self.capacity, step.protected | set(step.used))
        admitted = missing[: self.capacity - len(self.held)]
        self.order.admit(ids_of(admitted))
        self.held |= set(admitted)
        self.order.forget(ids_of(step.deleted))
        self.held -= set(step.deleted)

    def make_room(self, count: int, protected: Iterable[int]) -> None:
        """Let ``count`` ids leave, or all that may."""
        if count <= 0:
            return
        allowed = np.ones(max([_IDS, *self.held, *protected]) + 1, dtype=np.bool_)
        allowed[list(protected)] = False
        may_leave = {index for index in self.held if allowed[index]}
        victims = self.order.victims(count, allowed).tolist()
        require(len(set(victims)) == len(victims), f"{_list(victims)} must leave, one of them twice")
        require(
            set(victims) <= self.held,
            f"{_list(set(victims) - self.held)} must leave, and {_list(self.held)} are in the tier",
        )
        require(set(victims) <= may_leave, f"{_list(set(victims) - may_leave)} must leave, and may not")
        expected = min(count, len(may_leave))
        require(
            len(victims) == expected,
            f"room for {count} is needed and {len(may_leave)} may leave; the order names {len(victims)}",
        )
        self.order.evict(ids_of(victims))
        self.held -= set(victims)
        self.left += victims

    def ranking(self) -> list[int]:
        """Everything in the tier, in the order it would leave."""
        found: list[int] = self.order.victims(len(self.held)).tolist()
        return found


class PlacementLaws(PolicyLaws):
    """What every placement policy keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMyPlacement(PlacementLaws):
            @pytest.fixture
            def policy(self) -> PlacementPolicy:
                return MyPlacement()
    """

    @law("P1", "the tier is never over its capacity, and the order knows who is in it", trace=traces())
    def test_capacity_is_exact(self, policy: PlacementPolicy, trace: Trace) -> None:
        tier = SmallTier(policy.order(), trace.capacity)
        for step in trace.steps:
            tier.step(step)
            known = tier.order.residents
            require(known == len(tier.held), f"{len(tier.held)} ids are in the tier and the order counts {known}")
            require(known <= trace.capacity, f"{known} ids are in a tier of {trace.capacity}")

    @law("P2", "every id in the tier leaves once when all must leave", trace=traces())
    def test_all_leave_once(self, policy: PlacementPolicy, trace: Trace) -> None:
        tier = SmallTier(policy.order(), trace.capacity).run(trace)
        ranking = tier.ranking()
        require(
            sorted(ranking) == sorted(tier.held),
            f"{_list(tier.held)} are in the tier; {_list(ranking)} would leave it",
        )

    @law("P3", "what is protected or in flight never leaves", trace=traces(), share=st.floats(0, 1))
    def test_protected_ids_stay(self, policy: PlacementPolicy, trace: Trace, share: float) -> None:
        tier = SmallTier(policy.order(), trace.capacity).run(trace)
        protected = sorted(tier.held)[: int(share * len(tier.held))]
        tier.make_room(len(tier.held), protected)
        require(tier.held == set(protected), f"{_list(protected)} may not leave; {_list(tier.held)} are left")

    @law("P4", "asking who leaves next lets nobody leave", trace=traces())
    def test_asking_lets_nobody_leave(self, policy: PlacementPolicy, trace: Trace) -> None:
        tier = SmallTier(policy.order(), trace.capacity).run(trace)
        for count in range(len(tier.held) + 1):
            tier.order.victims(count)
            tier.order.victims(count, np.zeros(_IDS, dtype=np.bool_))
        require(tier.order.residents == len(tier.held), f"{tier.order.residents} of {len(tier.held)} are left")
        require(
            sorted(tier.ranking()) == sorted(tier.held), f"{_list(tier.held)} were there; {_list(tier.ranking())} are"
        )

    @law(
        "P6",
        "the same uses give the same victims, whatever other tiers saw",
        trace=traces(most=20),
        other=traces(most=10),
    )
    def test_tiers_do_not_share_state(self, policy: PlacementPolicy, trace: Trace, other: Trace) -> None:
        first = SmallTier(policy.order(), trace.capacity).run(trace)
        SmallTier(policy.order(), other.capacity).run(other)
        second = SmallTier(policy.order(), trace.capacity).run(trace)
        require(first.left == second.left, f"{_list(first.left)} left, then {_list(second.left)}")
        require(
            first.ranking() == second.ranking(),
            f"{_list(first.ranking())} would leave next, then {_list(second.ranking())}",
        )

    @law("P8", "what left is remembered for at most as many ids as the tier holds", trace=traces())
    def test_ghosts_are_bounded(self, policy: PlacementPolicy, trace: Trace) -> None:
        tier = SmallTier(policy.order(), trace.capacity)
        for step in trace.steps:
            tier.step(step)
            known = np.flatnonzero(tier.order.remembers(np.arange(_IDS))).tolist()
            ghosts = set(known) - tier.held
            require(tier.held <= set(known), f"{_list(tier.held - set(known))} are in the tier and not remembered")
            require(len(ghosts) <= trace.capacity, f"a tier of {trace.capacity} remembers {_list(ghosts)}")

    @law("P9", "a deleted id is forgotten", trace=traces(), gone=st.integers(0, _IDS - 1))
    def test_deleted_ids_are_forgotten(self, policy: PlacementPolicy, trace: Trace, gone: int) -> None:
        tier = SmallTier(policy.order(), trace.capacity).run(trace)
        tier.step(Step((gone,), deleted=(gone,)))
        require(not tier.order.remembers(ids_of([gone])).any(), f"{gone} was deleted and is remembered")
        require(gone not in tier.ranking(), f"{gone} was deleted and would leave again")

    @law(
        "P11",
        "a scan does not flush what is used again and again, if the policy says so",
        capacity=st.integers(10, 30),
        scan=st.integers(1, 4),
    )
    def test_scans_pass_through(self, policy: PlacementPolicy, capacity: int, scan: int) -> None:
        claimed(policy.scan_resistant, f"{policy.name} does not claim to resist scans")
        tier = SmallTier(policy.order(), capacity)
        hot = range(capacity // 2)
        for index in [*hot, *hot, *hot, *hot, *range(capacity, (1 + scan) * capacity)]:
            tier.step(Step((index,)))
        lost = set(hot) - tier.held
        require(
            not lost, f"ids 0 to {hot[-1]} were used 4 times; {_list(lost)} were lost to {scan * capacity} used once"
        )


def ids_of(ids: Iterable[int]) -> IdArray:
    """Ids as an order takes them."""
    return np.fromiter(ids, dtype=np.int64)


def _list(ids: Iterable[int]) -> str:
    listed = list(ids)
    shown = sorted(listed) if isinstance(ids, set | frozenset) else listed
    return ", ".join(map(str, shown)) or "none"
