"""TOVA: keep what the last token of the prompt looks at (Oren et al. 2024, arXiv 2401.06104, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.policy import Need, Phase, SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.types import GroupReduce

__all__ = ["TOVA"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TOVA(SelectionPolicy):
    """Evict once, at the end of prefill, by the attention of the last query.

    The paper lets all heads of a layer cast one vote and drops a token at every decode step; here each KV head decides
    for itself, once. The last token always stays, as in common implementations.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head; None takes the session's ``keep``.
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head cast one vote.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "TOVA, Oren et al. 2024, arXiv 2401.06104, section 3.2"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.WINDOW_ATTENTION})
    phase: ClassVar[Phase] = Phase.PREFILL
    query_aware: ClassVar[bool] = True

    keep: int | None = None
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        if self.group_reduce not in ("mean", "max", "sum"):
            raise PolicyError(f"tova: group_reduce must be 'mean', 'max' or 'sum', got {self.group_reduce!r}")
        if self.keep is not None and (type(self.keep) is not int or self.keep < 1):
            raise PolicyError(f"tova: keep must be an integer of at least 1 token, got {self.keep!r}")

    @property
    def window_queries(self) -> int:
        """The last query votes."""
        return 1

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The last token [B, Hk, T] bool, by their positions [B, Hk, T]."""
        newest = torch.arange(positions.shape[-1], device=positions.device)
        return (newest == positions.shape[-1] - 1).expand(positions.shape)

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """The last query's attention [B, Hk, T]."""
        return stats.require_window_attention()
