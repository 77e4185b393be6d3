"""H2O: heavy hitters of all attention so far and the newest tokens (Zhang et al. 2023, arXiv 2306.14048, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.policy import Need, Phase, SelectionPolicy, StepRule
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.policies.eviction.budgets import at_least, whole
from kvtier.types import GroupReduce, KVLayout

__all__ = ["H2O"]


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(SelectionPolicy):
    """After a prompt and after every step, drop what has received the least attention and is not recent.

    The published code sums scores over the batch and keeps query heads; here each row and KV head has its own, and
    votes are the exact column sums, from a second pass with the saved log-sum-exp. Old tokens have had more queries to
    collect from, as in the paper.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head, the recent ones included; None takes the session's ``keep``.
    recent : int
        Newest tokens that are never dropped.
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head cast one vote.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O, Zhang et al. 2023, arXiv 2306.14048, section 4"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.COLUMN_SUMS})
    phase: ClassVar[Phase] = Phase.DECODE
    query_aware: ClassVar[bool] = True

    keep: int | None = None
    recent: int = 64
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        whole(self.name, "recent", self.recent, 1)
        if self.group_reduce not in ("mean", "max", "sum"):
            raise PolicyError(f"h2o: group_reduce must be 'mean', 'max' or 'sum', got {self.group_reduce!r}")
        if self.keep is not None:
            whole(self.name, "keep", self.keep, self.recent + 1)

    @property
    def step_rule(self) -> StepRule:
        """What has received the least attention leaves."""
        return StepRule(by=Need.COLUMN_SUMS, recent=self.recent)

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The newest slots [B, Hk, T] bool."""
        order = torch.arange(positions.shape[-1], device=positions.device)
        return (order >= positions.shape[-1] - self.recent).expand(positions.shape)

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """All attention that each slot has received [B, Hk, T]."""
        del view
        return stats.require_column_sums()

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """``keep`` tokens in every layer, more than the recent ones."""
        at_least(self.name, keep, self.recent, "recent")
        return (keep,) * len(layout.layers)
