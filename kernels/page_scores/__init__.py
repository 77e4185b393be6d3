"""Ranking of pages by what is known of their keys (Quest, Tang et al. 2024, section 3.3)."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.page_scores import blocked, reference
from kvtier.types import GroupReduce

__all__ = ["box_scores"]


class PageScores(Protocol):
    """What an implementation of this operator provides."""

    def box_scores(
        self, q: torch.Tensor, low: torch.Tensor, high: torch.Tensor, group_reduce: GroupReduce, /
    ) -> torch.Tensor:
        """The checked arguments of the public function."""


OPERATOR: Final = Operator[PageScores](
    "page_scores",
    [
        Candidate("blocked", lambda: blocked, "two matrix products"),
        Candidate("reference", lambda: reference, "channel by channel"),
    ],
)


def box_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Upper bounds of q.k over the keys of each page, from their channel-wise bounds.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    low, high : Tensor
        [B, Hk, N, Dk]: channel-wise minimum and maximum of each page's keys.
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head agree; with "max" the score bounds every head's logits before scaling.

    Returns
    -------
    Tensor
        [B, Hk, N] fp32, or fp64 for fp64 inputs; the greatest over the queries.

    Raises
    ------
    InputError
        When shapes do not fit together.
    """
    if not (
        q.dim() == low.dim() == 4
        and low.shape == high.shape
        and q.shape[0] == low.shape[0]
        and q.shape[3] == low.shape[3]
        and low.shape[1]
        and q.shape[1] % low.shape[1] == 0
    ):
        raise InputError(
            "box_scores needs q [B, Hq, Tq, Dk] and bounds [B, Hk, N, Dk] with Hq a multiple of Hk, "
            f"got {list(q.shape)}, {list(low.shape)}, {list(high.shape)}"
        )
    return OPERATOR.on(q.device).box_scores(q, low, high, group_reduce)
