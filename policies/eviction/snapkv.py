"""SnapKV: keep what the prompt's last queries look at (Li et al. 2024, arXiv 2404.14469, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.policy import Need, Phase, SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.types import GroupReduce, KVLayout

__all__ = ["SnapKV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(SelectionPolicy):
    """Evict once, at the end of prefill, by the pooled attention of the last queries.

    The published code ranks per query head after repeating K and V; here the G query heads of a KV head cast one
    vote, so nothing is stored twice.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head, the window included; None takes the session's ``keep``.
    window : int
        Queries that vote; their own tokens are always kept.
    kernel : int
        Width of the max-pool over tokens, odd; neighbours of a needle survive with it.
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head cast one vote.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, Li et al. 2024, arXiv 2404.14469, section 4.2"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.WINDOW_ATTENTION})
    phase: ClassVar[Phase] = Phase.PREFILL
    query_aware: ClassVar[bool] = True

    keep: int | None = None
    window: int = 32
    kernel: int = 7
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise PolicyError(f"snapkv: window must be an integer of at least 1 query, got {self.window!r}")
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"snapkv: kernel must be an odd integer of at least 1, got {self.kernel!r}")
        if self.group_reduce not in ("mean", "max", "sum"):
            raise PolicyError(f"snapkv: group_reduce must be 'mean', 'max' or 'sum', got {self.group_reduce!r}")
        if self.keep is not None and (type(self.keep) is not int or self.keep <= self.window):
            raise PolicyError(f"snapkv: keep must be more than window ({self.window}) tokens, got {self.keep!r}")

    @property
    def window_queries(self) -> int:
        """The last ``window`` queries vote."""
        return self.window

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The window's own tokens [B, Hk, T] bool, by their positions [B, Hk, T]."""
        newest = torch.arange(positions.shape[-1], device=positions.device)
        return (newest >= positions.shape[-1] - self.window).expand(positions.shape)

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """Votes [B, Hk, T], max-pooled over neighbouring slots; slots in ``view.protected`` are not ranked."""
        votes = stats.require_window_attention().masked_fill(view.protected, 0.0)
        return torch.nn.functional.max_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """``keep`` tokens in every layer, more than the window."""
        if keep <= self.window:
            raise PolicyError(f"snapkv: keep must be more than window ({self.window}) tokens, got {keep}")
        return (keep,) * len(layout.layers)
