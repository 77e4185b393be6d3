"""Teeth of the eviction laws: runtimes with one fault, and the law that catches each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from kvtier.core.policy import (
    SelectionPolicy,
)
from kvtier.testing.eviction_laws import Evicting, EvictionLaws, Prompt
from kvtier.testing.law import PHASES, LawBroken, laws_of

EXAMPLES = 30


class _Wrapped:
    """A session with one fault."""

    def __init__(self, inner: Evicting) -> None:
        self._inner = cast("Any", inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def length(self) -> int:
        length: int = self._inner.length
        return length


class _CountsKeptTokens(_Wrapped):
    """The next position is the number of kept tokens: every later token is rotated wrongly."""

    @property
    def length(self) -> int:
        kept: int = self._inner.report().kept
        return kept


class _KeepsKeysOfOthers(_Wrapped):
    """Kept values move, and the keys stay where they were."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        self._inner.append(layer, k, v.roll(1, dims=2), positions)


class _LeaksBatch(_Wrapped):
    """Row 0's queries vote for every row."""

    def attend(self, layer: int, q: torch.Tensor, positions: torch.Tensor, *, scale: float) -> torch.Tensor:
        if q.shape[2] > 1:
            q = q[:1].expand_as(q)
        out: torch.Tensor = self._inner.attend(layer, q, positions, scale=scale)
        return out


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (_CountsKeptTokens, "S15", r"\d+ tokens of prompt and one more were seen; the next would be at \d+"),
        (_KeepsKeysOfOthers, "S16", r"a kept token's weight is off by .*; its key or its place is another's"),
        (_LeaksBatch, "S17", r"row \d keeps other tokens alone than in company"),
    ],
)
def test_wrong_runtimes_are_caught(fault: type[_Wrapped], code: str, words: str) -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from kvtier.policies.eviction.snapkv import SnapKV

    class Runtime(EvictionLaws):
        @contextmanager
        def open_session(self, policy: SelectionPolicy, prompt: Prompt) -> Iterator[Evicting]:
            with super().open_session(policy, prompt) as session:
                yield cast("Evicting", fault(session))

    stated = next(stated for stated in laws_of(Runtime) if stated.code == code)

    @settings(
        max_examples=EXAMPLES, database=None, derandomize=True, deadline=None, phases=PHASES, report_multiple_bugs=False
    )
    @given(st.data())
    def hold(data: st.DataObject) -> None:
        stated.hold(Runtime(), SnapKV(window=1), data)

    with pytest.raises(LawBroken, match=words):
        hold()
