"""Scores by which pages are ranked: bounds from boxes (Quest) or bit planes, landmarks (ShadowKV), centroids (IVF)."""

from __future__ import annotations

from typing import Final, Protocol, get_args

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.page_scores import blocked, reference
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import GroupReduce

__all__ = ["box_scores", "centroid_scores", "landmark_scores", "plane_scores"]

_REDUCTIONS: Final = get_args(GroupReduce)
_MOST_PLANES: Final = 8


class PageScores(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def box_scores(
        self, q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce, /
    ) -> torch.Tensor:
        """Bounds from boxes."""

    def plane_scores(
        self,
        q: torch.Tensor,
        planes: torch.Tensor,
        kmin: torch.Tensor,
        kmax: torch.Tensor,
        group_reduce: GroupReduce,
        /,
    ) -> torch.Tensor:
        """Bounds from bit planes."""

    def landmark_scores(self, q: torch.Tensor, landmarks: torch.Tensor, group_reduce: GroupReduce, /) -> torch.Tensor:
        """Products with landmarks."""

    def centroid_scores(
        self, q: torch.Tensor, centroids: torch.Tensor, clusters: torch.Tensor, group_reduce: GroupReduce, /
    ) -> torch.Tensor:
        """Products with the centroids of the slots' clusters."""


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
        Candidate("triton", _triton, "summaries are read once", triton_obstacle),
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
    if not (_fits(q, kmin) and kmin.shape == kmax.shape):
        raise InputError(
            "box_scores needs q [B, Hq, Tq, Dk] with Tq >= 1, kmin and kmax [B, Hk, N, Dk] with Hq a multiple of Hk, "
            f"got {_told(q, kmin, kmax)}"
        )
    _check_reduction(group_reduce)
    return OPERATOR.on(q.device).box_scores(q, kmin, kmax, group_reduce)


def plane_scores(
    q: torch.Tensor, planes: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Upper bound of q . k over the keys of each page, from the first planes of their codes.

    Per slot ``q . k_hat + |q| . step / 2``, with k_hat the middle of the cell that the planes name and step its width;
    of the slots the greatest. Each further plane halves the step, and never raises the bound; without planes it is that
    of :func:`box_scores`.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    planes : Tensor
        [B, Hk, N, b, P, ceil(Dk / 8)] uint8, of all pages the first b planes that
        :func:`kvtier.kernels.page_summaries.page_planes` gave, 0 to 8; a strided view is read in place.
    kmin, kmax, group_reduce
        As for :func:`box_scores`.

    Returns
    -------
    Tensor
        [B, Hk, N], fp32, or fp64 when q or a bound is.

    Raises
    ------
    InputError
        When shapes do not fit together, there is no query or slot, or the reduction is unknown.
    """
    if not (
        _fits(q, kmin)
        and kmin.shape == kmax.shape
        and planes.dim() == 6
        and planes.dtype == torch.uint8
        and planes.shape[:3] == kmin.shape[:3]
        and planes.shape[3] <= _MOST_PLANES
        and planes.shape[4]
        and planes.shape[5] == -(-q.shape[3] // 8)
    ):
        raise InputError(
            "plane_scores needs q [B, Hq, Tq, Dk] with Tq >= 1, planes [B, Hk, N, up to 8, P, ceil(Dk / 8)] of uint8, "
            "kmin and kmax [B, Hk, N, Dk] with Hq a multiple of Hk, "
            f"got {_told(q, planes, kmin, kmax)} and {planes.dtype}"
        )
    _check_reduction(group_reduce)
    return OPERATOR.on(q.device).plane_scores(q, planes, kmin, kmax, group_reduce)


def landmark_scores(q: torch.Tensor, landmarks: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Products of queries with the landmark of each page, an estimate of its logits; also those with centroids.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    landmarks : Tensor
        [B, Hk, N, Dk] as :func:`kvtier.kernels.page_summaries.page_landmarks` gives them; a strided view is read in
        place.
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
    if not _fits(q, landmarks):
        raise InputError(
            "landmark_scores needs q [B, Hq, Tq, Dk] with Tq >= 1 and landmarks [B, Hk, N, Dk] with Hq a multiple of "
            f"Hk, got {_told(q, landmarks)}"
        )
    _check_reduction(group_reduce)
    return OPERATOR.on(q.device).landmark_scores(q, landmarks, group_reduce)


def centroid_scores(
    q: torch.Tensor, centroids: torch.Tensor, clusters: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Scores of pages whose slots belong to clusters: of each page the best centroid that one of its slots belongs to.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    centroids : Tensor
        [B, Hk, C, Dk]; one that no slot belongs to counts nowhere.
    clusters : Tensor
        [B, Hk, N, P] int64: the cluster of each slot, in [0, C).
    group_reduce
        As for :func:`landmark_scores`.

    Returns
    -------
    Tensor
        [B, Hk, N], fp32, or fp64 when q or the centroids are.

    Raises
    ------
    InputError
        When shapes do not fit together, there is no query or slot, or the reduction is unknown.
    """
    if not (
        _fits(q, centroids)
        and clusters.dim() == 4
        and clusters.dtype == torch.int64
        and clusters.shape[:2] == centroids.shape[:2]
        and clusters.shape[3]
    ):
        raise InputError(
            "centroid_scores needs q [B, Hq, Tq, Dk] with Tq >= 1, centroids [B, Hk, C, Dk] with Hq a multiple of Hk, "
            f"and clusters [B, Hk, N, P] of int64, got {_told(q, centroids, clusters)} and {clusters.dtype}"
        )
    _check_reduction(group_reduce)
    return OPERATOR.on(q.device).centroid_scores(q, centroids, clusters, group_reduce)


def _fits(q: torch.Tensor, summaries: torch.Tensor) -> bool:
    """Whether q [B, Hq, Tq, Dk] and summaries [B, Hk, N, Dk] go together."""
    return bool(
        q.dim() == summaries.dim() == 4
        and q.shape[0] == summaries.shape[0]
        and q.shape[3] == summaries.shape[3]
        and q.shape[2]
        and summaries.shape[1]
        and q.shape[1] % summaries.shape[1] == 0
    )


def _told(*tensors: torch.Tensor) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)


def _check_reduction(group_reduce: GroupReduce) -> None:
    if group_reduce not in _REDUCTIONS:
        raise InputError(f"group_reduce must be one of {', '.join(_REDUCTIONS)}, got {group_reduce!r}")
