"""Scores by which pages are ranked: a bound from the limits of each channel (Quest, Tang et al. 2024, section 3.2)."""

from __future__ import annotations

from typing import Final, Protocol, get_args

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.page_scores import blocked, reference
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import GroupReduce

__all__ = ["box_scores"]

_REDUCTIONS: Final = get_args(GroupReduce)


class PageScores(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def box_scores(
        self, q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce, /
    ) -> torch.Tensor:
        """Scores of pages."""


def _triton() -> PageScores:
    from kvtier.kernels.page_scores import triton

    return triton


def _native() -> PageScores:
    from kvtier.kernels.page_scores import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.page_scores import native

    return native.obstacle(device)


OPERATOR: Final = Operator[PageScores](
    "page_scores",
    [
        Candidate("triton", _triton, "bounds are read once", triton_obstacle),
        Candidate("native", _native, "bounds are read once, as fast as memory gives them", _native_obstacle),
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "channel by channel"),
    ],
)


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Upper bound of q . k over the keys of each page: ``relu(q) . kmax - relu(-q) . kmin``.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    kmin, kmax : Tensor
        [B, Hk, N, Dk] as :func:`kvtier.kernels.page_summaries.page_bounds` gives them; strided views are read in place.
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of a KV head come to one score; over the Tq queries the greatest counts.

    Returns
    -------
    Tensor
        [B, Hk, N], fp32, or fp64 when an input is.

    Raises
    ------
    InputError
        When shapes do not fit together, there is no query, or the reduction is unknown.
    """
    if not (
        q.dim() == kmin.dim() == 4
        and kmin.shape == kmax.shape
        and q.shape[0] == kmin.shape[0]
        and q.shape[3] == kmin.shape[3]
        and q.shape[2]
        and kmin.shape[1]
        and q.shape[1] % kmin.shape[1] == 0
    ):
        raise InputError(
            "box_scores needs q [B, Hq, Tq, Dk] with Tq >= 1, kmin and kmax [B, Hk, N, Dk] with Hq a multiple of Hk, "
            f"got {list(q.shape)}, {list(kmin.shape)}, {list(kmax.shape)}"
        )
    if group_reduce not in _REDUCTIONS:
        raise InputError(f"group_reduce must be one of {', '.join(_REDUCTIONS)}, got {group_reduce!r}")
    return OPERATOR.on(q.device).box_scores(q, kmin, kmax, group_reduce)
