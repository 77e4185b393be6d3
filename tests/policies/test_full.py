"""Full: everything is kept and read."""

from __future__ import annotations

from kvtier.core.compose import bind
from kvtier.policies.full import Full
from kvtier.testing.session_machine import small_layout
from kvtier.types import Budgets


def test_full_keeps_and_reads_everything() -> None:
    bound = bind(Full(), small_layout(), Budgets(device=1 << 20))

    assert (bound.keep, bound.read, bound.selection, bound.retrieval) == (None, None, None, None)
    assert bound.lossless
    assert bound.label == "full"
