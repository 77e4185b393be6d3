"""Expected Attention: keep what queries to come will look at (Devoto et al. 2025, arXiv 2510.00636, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.policy import Need, SelectionPolicy
from kvtier.core.rotation import mean_rotation
from kvtier.core.selection import group_reduce
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.policies.eviction.budgets import at_least, whole
from kvtier.types import GroupReduce, KVLayout, Rope

__all__ = ["ExpectedAttention"]

_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedAttention(SelectionPolicy):
    """Evict once, at the end of prefill, by the attention that a Gaussian query of the next positions would pay.

    Queries before rotation are taken as Gaussian, with the mean mu and covariance S of the prompt's. Both are turned by
    the mean rotation R of the next ``n_future`` positions, and a key k expects
    ``exp(R mu . k * scale + k . R S R^T k * scale**2 / 2)``, normalised over the keys, times the length of its value.

    The published code pads the score of the sinks with the largest of the batch and takes ``1 / sqrt(D)`` for every
    model; here sinks are protected and the scale is the model's. Soft caps of logits are left out, as in the paper.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head, the sinks included; None takes the session's ``keep``.
    n_future : int
        Positions after the prompt over which the rotation is averaged.
    n_sink : int
        First tokens, which are never dropped; their queries, often outliers, are left out of the statistics.
    use_covariance : bool
        Whether the spread of the queries counts, or their mean alone.
    use_vnorm : bool
        Whether a key's share is multiplied by the length of its value.
    epsilon : float
        Added to every share before that.
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head cast one vote.
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "Expected Attention, Devoto et al. 2025, arXiv 2510.00636, section 3"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERY_MOMENTS, Need.KEYS, Need.VALUE_NORMS})
    query_aware: ClassVar[bool] = True

    keep: int | None = None
    n_future: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        whole(self.name, "n_future", self.n_future, 1)
        whole(self.name, "n_sink", self.n_sink, 0)
        for flag in ("use_covariance", "use_vnorm"):
            if type(getattr(self, flag)) is not bool:
                raise PolicyError(f"{self.name}: {flag} must be True or False, got {getattr(self, flag)!r}")
        if not isinstance(self.epsilon, int | float) or not self.epsilon >= 0:
            raise PolicyError(f"{self.name}: epsilon must be at least 0, got {self.epsilon!r}")
        if self.group_reduce not in ("mean", "max", "sum"):
            raise PolicyError(f"{self.name}: group_reduce must be 'mean', 'max' or 'sum', got {self.group_reduce!r}")
        if self.keep is not None:
            whole(self.name, "keep", self.keep, self.n_sink + 1)

    @property
    def skipped_queries(self) -> int:
        """Those of the sinks."""
        return self.n_sink

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The sinks [B, Hk, T] bool, by their positions [B, Hk, T]."""
        return positions < self.n_sink

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """Expected attention of each slot [B, Hk, T]; slots in ``view.protected`` are not ranked."""
        keys = view.require_keys()
        logits = torch.stack([self._logits(row, view, stats) for row in range(keys.shape[0])])
        open_logits = logits.masked_fill(view.protected.unsqueeze(2), -torch.inf)
        shares = torch.nan_to_num(torch.softmax(open_logits, dim=-1))
        votes = group_reduce(shares.flatten(1, 2), keys.shape[1], self.group_reduce)
        return (votes + self.epsilon) * view.require_value_norms() if self.use_vnorm else votes

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """``keep`` tokens in every layer, more than the sinks."""
        at_least(self.name, keep, self.n_sink, "n_sink")
        return (keep,) * len(layout.layers)

    def _logits(self, row: int, view: SlotView, stats: Stats) -> torch.Tensor:
        """Logarithm of the expected exponential [Hk, G, T] of every slot of a row."""
        moments, keys = stats.require_query_moments(), view.require_keys()[row].float()
        heads, _, dim = keys.shape
        turn = self._turn(view.positions[row, :, -1], moments.rope, dim)
        mean = moments.mean[row].unflatten(0, (heads, -1)) @ turn.mT * moments.scale
        covariance = moments.covariance[row].unflatten(0, (heads, -1))
        spread = turn.unsqueeze(1) @ covariance @ turn.mT.unsqueeze(1) * (moments.scale**2 / 2)
        parts = []
        for block in keys.split(_BLOCK, dim=1):
            logits = mean @ block.mT
            if self.use_covariance:
                logits = logits + ((block.unsqueeze(1) @ spread) * block.unsqueeze(1)).sum(-1)
            parts.append(logits)
        return torch.cat(parts, dim=-1)

    def _turn(self, newest: torch.Tensor, rope: Rope, dim: int) -> torch.Tensor:
        """The mean rotation [Hk, Dk, Dk] of the positions after the ``newest`` [Hk], nearly always the same."""
        coming = torch.arange(1, self.n_future + 1, device=newest.device)
        turns = {last: mean_rotation(rope, last + coming, dim) for last in set(newest.tolist())}
        return torch.stack([turns[last] for last in newest.tolist()])
