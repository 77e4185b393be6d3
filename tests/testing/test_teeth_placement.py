"""Teeth of the placement laws: bugs made on purpose, and the law that catches each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest

from kvtier.core.policy import (
    PlacementPolicy,
    Policy,
)
from kvtier.policies.placement.lru import LRU
from kvtier.storage_backends.eviction import BoolArray, EvictionOrder, IdArray
from kvtier.testing.check import check_policy

EXAMPLES = 12


class _IgnoresLeases(EvictionOrder):
    """LRU that a reader cannot hold up."""

    def __init__(self) -> None:
        self._inner = LRU().order()

    @property
    def residents(self) -> int:
        return self._inner.residents

    def admit(self, ids: IdArray) -> None:
        self._inner.admit(ids)

    def hit(self, ids: IdArray) -> None:
        self._inner.hit(ids)

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        return self._inner.victims(count)

    def evict(self, ids: IdArray) -> None:
        self._inner.evict(ids)

    def forget(self, ids: IdArray) -> None:
        self._inner.forget(ids)

    def remembers(self, ids: IdArray) -> BoolArray:
        return self._inner.remembers(ids)


class _RemembersAll(_IgnoresLeases):
    """A ghost list that nobody trims."""

    def __init__(self) -> None:
        super().__init__()
        self._ghosts: set[int] = set()

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        return self._inner.victims(count, allowed)

    def evict(self, ids: IdArray) -> None:
        super().evict(ids)
        self._ghosts |= set(ids.tolist())

    def remembers(self, ids: IdArray) -> BoolArray:
        return self._inner.remembers(ids) | np.isin(ids, list(self._ghosts))


@dataclass(frozen=True, slots=True, kw_only=True)
class IgnoresLeases(LRU):
    def order(self) -> EvictionOrder:
        return _IgnoresLeases()


@dataclass(frozen=True, slots=True, kw_only=True)
class RemembersAll(LRU):
    def order(self) -> EvictionOrder:
        return _RemembersAll()


@dataclass(frozen=True, kw_only=True)
class SharesOneOrder(PlacementPolicy):
    name: ClassVar[str] = "shared"
    paper: ClassVar[str] = "none"
    shared: EvictionOrder = field(default_factory=lambda: LRU().order())

    def order(self) -> EvictionOrder:
        return self.shared


class ClaimsToResistScans(LRU):
    scan_resistant = True


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (IgnoresLeases(), "P3", r"0 must leave, and may not"),
        (RemembersAll(), "P8", r"a tier of \d remembers \d"),
        (SharesOneOrder(), "P6", r"."),
        (ClaimsToResistScans(), "P11", r"ids 0 to 4 were used 4 times; 0, 1, 2, 3, 4 were lost to 10 used once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_wrong_placements_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found
