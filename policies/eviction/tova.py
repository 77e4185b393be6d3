"""TOVA: at every step drop what the newest query looks at least (Oren et al. 2024, arXiv 2401.06104, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.policy import Need, Phase, SelectionPolicy, StepRule
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.policies.eviction.budgets import at_least, whole
from kvtier.types import GroupReduce, KVLayout

__all__ = ["TOVA"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TOVA(SelectionPolicy):
    """A multi-state recurrent network: the state is what the last token attends to, and nothing is fixed.

    The paper averages over all heads of a layer, so that they keep the same tokens; here each KV head keeps its own.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head; None takes the session's ``keep``.
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head cast one vote.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "TOVA, Oren et al. 2024, arXiv 2401.06104, section 4"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.WINDOW_ATTENTION})
    phase: ClassVar[Phase] = Phase.DECODE
    query_aware: ClassVar[bool] = True

    keep: int | None = None
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        if self.group_reduce not in ("mean", "max", "sum"):
            raise PolicyError(f"tova: group_reduce must be 'mean', 'max' or 'sum', got {self.group_reduce!r}")
        if self.keep is not None:
            whole(self.name, "keep", self.keep, 2)

    @property
    def window_queries(self) -> int:
        """The newest query votes."""
        return 1

    @property
    def step_rule(self) -> StepRule:
        """What the newest query looks at least leaves."""
        return StepRule(by=Need.WINDOW_ATTENTION, recent=1)

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The newest slot [B, Hk, T] bool: its own query has just come."""
        order = torch.arange(positions.shape[-1], device=positions.device)
        return (order == positions.shape[-1] - 1).expand(positions.shape)

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """Attention of the newest query [B, Hk, T]."""
        del view
        return stats.require_window_attention()

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """``keep`` tokens in every layer, at least two."""
        at_least(self.name, keep, 1, "the newest token")
        return (keep,) * len(layout.layers)
