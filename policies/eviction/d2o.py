"""D2O: layers share a budget by how spread their attention is, and what is dropped is merged (Wan et al. 2024).

arXiv 2406.13035, sections 3.2 (dynamic allocation) and 3.3 (dynamic merging).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvtier.core.policy import KeepPlan, MergePlan, Need, Phase, Scope, SelectionPolicy, StepRule
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.policies.eviction.budgets import at_least, share_out, whole
from kvtier.types import GroupReduce, KVLayout

__all__ = ["D2O"]

_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class D2O(SelectionPolicy):
    """Budgets by attention density; heavy hitters and recent tokens stay, the rest is merged into them.

    A layer whose column sums vary much attends to few tokens and gets less. A dropped token is merged into the kept one
    whose key is nearest by cosine, if it is near enough; else it is lost. The merged key and value are convex
    combinations with weights ``exp(similarity)``, the kept token's own among them.

    Near enough is a running mean of similarities: at the end of a prompt that of its dropped tokens; with
    ``when="step"`` every step drops and merges too, and moves the threshold towards what it saw by ``1 - momentum``.
    Each sequence, layer and KV head has its own threshold, which begins anew with the sequence.

    The published code scales the dropped vectors by their similarity and averages without weights, which shrinks them;
    it lets one threshold live from sample to sample and decides for all heads at once.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head on average over the layers; None takes the session's ``keep``.
    sinks, recent : int
        First and newest tokens, which are never dropped.
    when : "prefill" | "step"
        Whether it acts at the end of a prompt alone, or after every step too.
    momentum : float
        Share of the old threshold in the new one, from 0 to below 1 (0.5 in the published code).
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head cast one vote.
    """

    name: ClassVar[str] = "d2o"
    paper: ClassVar[str] = "D2O, Wan et al. 2024, arXiv 2406.13035, sections 3.2 and 3.3"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.COLUMN_SUMS, Need.KEYS})
    scope: ClassVar[Scope] = Scope.MODEL
    query_aware: ClassVar[bool] = True

    keep: int | None = None
    sinks: int = 4
    recent: int = 64
    when: Literal["prefill", "step"] = "prefill"
    momentum: float = 0.5
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        whole(self.name, "sinks", self.sinks, 0)
        whole(self.name, "recent", self.recent, 1)
        if self.when not in ("prefill", "step"):
            raise PolicyError(f"d2o: when must be 'prefill' or 'step', got {self.when!r}")
        if not isinstance(self.momentum, int | float) or not 0 <= self.momentum < 1:
            raise PolicyError(f"d2o: momentum must be from 0 to below 1, got {self.momentum!r}")
        if self.group_reduce not in ("mean", "max", "sum"):
            raise PolicyError(f"d2o: group_reduce must be 'mean', 'max' or 'sum', got {self.group_reduce!r}")
        if self.keep is not None:
            whole(self.name, "keep", self.keep, self.sinks + self.recent + 1)

    @property
    def phase(self) -> Phase:
        """As ``when`` says."""
        return Phase.DECODE if self.when == "step" else Phase.PREFILL

    @property
    def step_rule(self) -> StepRule:
        """What has received the least attention leaves."""
        return StepRule(by=Need.COLUMN_SUMS, sinks=self.sinks, recent=self.recent)

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The sinks and the newest slots [B, Hk, T] bool."""
        order = torch.arange(positions.shape[-1], device=positions.device)
        return (positions < self.sinks) | (order >= positions.shape[-1] - self.recent)

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """All attention that each slot has received [B, Hk, T]."""
        del view
        return stats.require_column_sums()

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """``keep`` tokens in every layer until all were seen, more than what is never dropped."""
        at_least(self.name, keep, self.sinks + self.recent, "sinks + recent")
        return (keep,) * len(layout.layers)

    def share(self, keep: tuple[int, ...], column_sums: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Budgets in proportion to ``softmax(-density)``, the variance of the column sums [Hq, T] scaled to 0 ... 1."""
        density = torch.stack([sums.double().var(dim=1, unbiased=False).mean() for sums in column_sums])
        spread = density.max() - density.min()
        scaled = (density - density.min()) / spread if float(spread) > 0 else torch.zeros_like(density)
        weights = torch.softmax(-scaled, dim=0).tolist()
        return share_out(weights, sum(keep), self.sinks + self.recent + 1)

    def merge(self, view: SlotView, plan: KeepPlan) -> MergePlan | None:
        """Each dropped slot near enough goes into its nearest kept one, with weights as the class says."""
        keys, keep = view.require_keys(), plan.keep
        slots = keys.shape[2]
        if keep.shape[-1] >= slots:
            return None
        stays = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device).scatter_(2, keep, value=True)
        dropped = (~stays).nonzero()[:, 2].view(*keep.shape[:2], slots - keep.shape[-1])
        nearness, into = _nearest(keys, dropped, keep, stays)
        threshold = nearness.mean(dim=-1, keepdim=True)
        if view.memory is not None:
            threshold = self.momentum * view.memory + (1 - self.momentum) * threshold
        near = nearness >= threshold
        force = torch.where(near, nearness.exp(), torch.zeros_like(nearness))
        total = torch.zeros(stays.shape, dtype=force.dtype, device=keys.device).scatter_add_(2, into, force)
        # One that is dropped has one taker, and nothing needs to be said of the others.
        takers = into if into.shape[2] == 1 else keep
        taken = total.gather(2, takers)
        own = torch.where(taken > 0, torch.e / (torch.e + taken), torch.zeros_like(taken))
        return MergePlan(
            src=torch.cat([dropped, takers], dim=2),
            dst=torch.cat([into, takers], dim=2),
            weight=torch.cat([force / (torch.e + total.gather(2, into)), own], dim=2),
            memory=threshold,
        )


def _nearest(
    keys: torch.Tensor, dropped: torch.Tensor, keep: torch.Tensor, stays: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greatest cosine of each dropped slot [B, Hk, M] with the kept ones [B, Hk, K], and the slot: [B, Hk, M]."""
    keys = keys.float()
    # As long as the least that does not vanish: a key of zeros is near to nothing.
    lengths = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(torch.finfo(keys.dtype).tiny)
    asked = _taken(keys, dropped) / _taken(lengths, dropped)
    if dropped.shape[2] == 1:
        # All keys where they lie: to copy the kept ones takes longer than to look at one more.
        cosines = (keys @ asked.mT / lengths).squeeze(3).masked_fill(~stays, -torch.inf)
        best = cosines.max(dim=-1, keepdim=True)
        return best.values, best.indices
    kept = _taken(keys, keep) / _taken(lengths, keep)
    parts = [(part @ kept.mT).max(dim=-1) for part in asked.split(_BLOCK, dim=2)]
    return torch.cat([one.values for one in parts], dim=2), keep.gather(2, torch.cat([one.indices for one in parts], 2))


def _taken(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return values.gather(2, slots.unsqueeze(-1).expand(*slots.shape, values.shape[-1]))
