"""Attention over the pages of each KV head that rank best by their boxes, and over its newest keys, in one call."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.ranked_attention import blocked, reference
from kvtier.kernels.ranked_attention.ranked import Newest, Ranked
from kvtier.types import GroupReduce

__all__ = ["Newest", "Ranked", "attend_ranked"]


class RankedAttention(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def attend_ranked(
        self,
        q: torch.Tensor,
        kmin: torch.Tensor,
        kmax: torch.Tensor,
        k_arena: torch.Tensor,
        v_arena: torch.Tensor,
        frames: torch.Tensor,
        count: int,
        /,
        *,
        newest: Newest | None,
        group_reduce: GroupReduce,
        scale: float,
        softcap: float | None,
    ) -> Ranked:
        """Every query sees every key."""


def _native() -> RankedAttention:
    from kvtier.kernels.ranked_attention import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.ranked_attention import native

    return native.obstacle(device)


OPERATOR: Final = Operator[RankedAttention](
    "ranked_attention",
    [
        Candidate("native", _native, "threads score, choose and attend without a pause in between", _native_obstacle),
        Candidate("blocked", lambda: blocked, "one operator after the other"),
        Candidate("reference", lambda: reference, "the references of all steps"),
    ],
)


def attend_ranked(
    q: torch.Tensor,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    count: int,
    *,
    newest: Newest | None = None,
    group_reduce: GroupReduce,
    scale: float,
    softcap: float | None = None,
) -> Ranked:
    """Attention of queries over the ``count`` pages of each KV head with the highest box bounds, and over newer keys.

    ``box_scores``, ``top_pages``, ``attend_pages``, ``attend_run`` and ``merge_partials`` in one, as precise as those.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk], which see every key.
    kmin, kmax : Tensor
        [B, Hk, N, Dk], the bounds of the keys of each page.
    k_arena, v_arena : Tensor
        [F, P, Dk] and [F, P, Dv]: F frames of P slots.
    frames : Tensor
        [B, Hk, N] int64: which frame holds page n. Frames of pages that are not chosen are never read.
    count : int
        Pages to attend, from 1 on; all of them when there are fewer.
    newest : pair of Tensor, optional
        Keys [B, Hk, n, Dk] and values [B, Hk, n, Dv], which are attended besides.
    group_reduce : "mean" | "max" | "sum"
        As for :func:`kvtier.kernels.page_scores.box_scores`.
    scale, softcap
        As for :func:`kvtier.kernels.gather_attention.attend_pages`.

    Returns
    -------
    Ranked
        The partial, and the pages [B, Hk, min(count, N)] int64, ascending; of equal scores any may win.

    Raises
    ------
    InputError
        When shapes do not fit together, or a frame is out of range (on a GPU only with ``KVTIER_DEBUG=1``).
    """
    if not _fit(q, kmin, kmax, k_arena, v_arena, frames, newest) or count < 1:
        raise _unfit(count, q, kmin, kmax, k_arena, v_arena, frames, *(newest or ()))
    if group_reduce not in ("mean", "max", "sum"):
        raise InputError(f"group_reduce must be one of mean, max, sum, got {group_reduce!r}")
    run = OPERATOR.on(q.device).attend_ranked
    tensors = (q, kmin, kmax, k_arena, v_arena, frames)
    return run(*tensors, count, newest=newest, group_reduce=group_reduce, scale=scale, softcap=softcap)


def _unfit(count: int, *tensors: torch.Tensor) -> InputError:
    return InputError(
        "attend_ranked needs q [B, Hq, Tq, Dk], kmin and kmax [B, Hk, N, Dk], arenas [F, P, Dk] and [F, P, Dv], "
        "frames [B, Hk, N], newest [B, Hk, n, Dk] and [B, Hk, n, Dv] with Hq a multiple of Hk, and a count of at "
        f"least 1; got {', '.join(str(list(one.shape)) for one in tensors)} and {count}"
    )


def _fit(
    q: torch.Tensor,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    newest: Newest | None,
) -> bool:
    queries, bounds, arena, values, paged = q.shape, kmin.shape, k_arena.shape, v_arena.shape, frames.shape
    return bool(
        len(queries) == len(bounds) == 4
        and len(arena) == len(values) == len(paged) == 3
        and kmax.shape == bounds
        and bounds[:3] == paged
        and arena[:2] == values[:2]
        and queries[0] == bounds[0]
        and queries[2]
        and queries[3] == bounds[3] == arena[2]
        and bounds[1]
        and queries[1] % bounds[1] == 0
        and (
            newest is None
            or (
                newest[0].dim() == 4
                and newest[0].shape == (*paged[:2], newest[0].shape[2], arena[2])
                and newest[1].shape == (*newest[0].shape[:3], values[2])
            )
        )
    )
