"""What policies return: plans as index arrays, which the session and the tiers apply."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch

from kvtier.types import GroupReduce

if TYPE_CHECKING:
    from kvtier.core.policy import Need

__all__ = ["Boxes", "Encoded", "IntArray", "KeepPlan", "MergePlan", "StepRule", "ZonePlan"]

IntArray: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"


class KeepPlan(NamedTuple):
    """Slots that stay: ``keep`` [B, Hk, K] int64, ascending in each row.

    Where heads share a budget, only the first ``counts`` [B, Hk] entries of a row mean something; None stands for K.
    """

    keep: torch.Tensor
    counts: torch.Tensor | None = None

    @classmethod
    def of(cls, stays: torch.Tensor) -> KeepPlan:
        """The plan that keeps the slots where ``stays`` [B, Hk, T] bool is true."""
        counts = stays.sum(dim=-1)
        order = torch.argsort(~stays, dim=-1, stable=True)
        return cls(order[..., : int(counts.max())], counts)

    def stays(self, slots: int) -> torch.Tensor:
        """Which of ``slots`` slots stay [B, Hk, slots] bool."""
        times = torch.zeros(*self.keep.shape[:2], slots, dtype=torch.int64, device=self.keep.device)
        place = torch.arange(self.keep.shape[-1], device=self.keep.device)
        means = torch.ones_like(self.keep) if self.counts is None else (place < self.counts.unsqueeze(-1)).long()
        return times.scatter_add_(-1, self.keep, means) > 0

    def rows(self) -> list[list[list[int]]]:
        """The slots of each row and KV head."""
        if self.counts is None:
            return [row.tolist() for row in self.keep]
        return [
            [slots[:count] for slots, count in zip(row, counts, strict=True)]
            for row, counts in zip(self.keep.tolist(), self.counts.tolist(), strict=True)
        ]


class StepRule(NamedTuple):
    """Which token a KV head drops when it holds one too many: that with the least of a statistic, or the oldest.

    Of equal ones the last leaves. Those at positions below ``sinks`` and the ``recent`` newest stay.

    Attributes
    ----------
    by : Need, optional
        ``COLUMN_SUMS`` or ``WINDOW_ATTENTION``; None drops the oldest.
    """

    by: Need | None
    sinks: int = 0
    recent: int = 0


class MergePlan(NamedTuple):
    """Dropped slots folded into kept ones: ``src``, ``dst`` int64 and ``weight``, each [B, Hk, M].

    A ``dst`` that takes something states its own weight too, with ``src == dst``; the weights that go to one ``dst``
    sum to 1. An entry of weight 0 fills a row and means nothing. ``memory`` [B, Hk, S] fp32 is what the next merge of
    the same sequence finds in its ``SlotView``; it travels with forks and beams, and ends with the sequence.
    """

    src: torch.Tensor
    dst: torch.Tensor
    weight: torch.Tensor
    memory: torch.Tensor | None = None


class Boxes(NamedTuple):
    """Channel-wise bounds [B, Hk, N, Dk] of the keys of each page, by which a retrieval ranks."""

    low: torch.Tensor
    high: torch.Tensor
    group_reduce: GroupReduce


class ZonePlan(NamedTuple):
    """Pages that one decode step reads exactly: ``pages`` [B, Hk, K] int64, ascending in each row."""

    pages: torch.Tensor


class Encoded(NamedTuple):
    """A sealed block as a codec wrote it."""

    payload: bytes
    header: bytes
