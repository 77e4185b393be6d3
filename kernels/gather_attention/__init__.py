"""Attention over a run of keys, or over pages of an arena, as a partial (FlashAttention, Dao et al. 2022)."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.gather_attention import blocked, reference
from kvtier.kernels.spans import fits
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import Partial, Visibility

__all__ = ["attend_pages", "attend_run"]


class GatherAttention(Protocol):
    """What an implementation of this operator provides: the public functions with checked arguments."""

    def attend_run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        /,
        *,
        scale: float,
        softcap: float | None,
        visible: Visibility | None,
    ) -> Partial:
        """Attention over a run."""

    def attend_pages(
        self,
        q: torch.Tensor,
        k_arena: torch.Tensor,
        v_arena: torch.Tensor,
        frames: torch.Tensor,
        /,
        *,
        scale: float,
        softcap: float | None,
        visible: Visibility | None,
    ) -> Partial:
        """Attention over pages."""


def _triton() -> GatherAttention:
    from kvtier.kernels.gather_attention import triton

    return triton


def _native() -> GatherAttention:
    from kvtier.kernels.gather_attention import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.gather_attention import native

    return native.obstacle(device)


OPERATOR: Final = Operator[GatherAttention](
    "gather_attention",
    [
        Candidate("triton", _triton, "one pass over the keys, split to fill the GPU", triton_obstacle),
        Candidate("native", _native, "keys and values are read once, as fast as memory gives them", _native_obstacle),
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "dense, in one piece"),
    ],
)


def attend_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
) -> Partial:
    """Softmax attention of queries over one run of keys.

    Computed in fp32 whatever the 16-bit type of the inputs, in fp64 when one of them is fp64. Not differentiable: call
    it under ``torch.no_grad()``. Any number of threads may call it at the same time.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    k, v : Tensor
        [B, Hk, N, Dk] and [B, Hk, N, Dv]; strided views are read in place. Query head h belongs to KV head ``h // G``.
    scale : float
        Multiplies q k^T.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)`` after scaling.
    visible : Visibility, optional
        q_pos [B, Tq] and k_pos [B, Hk or 1, N]; None lets every query see every key.

    Returns
    -------
    Partial
        out [B, Hq, Tq, Dv], lse [B, Hq, Tq]; ``(0, -inf)`` for a query that sees no key.

    Raises
    ------
    InputError
        When shapes do not fit together.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not (
        len(q_shape) == len(k_shape) == len(v_shape) == 4
        and k_shape[:3] == v_shape[:3]
        and q_shape[0] == k_shape[0]
        and q_shape[3] == k_shape[3]
        and k_shape[1]
        and q_shape[1] % k_shape[1] == 0
        and (visible is None or fits(visible, q, k_shape[1], k_shape[2]))
    ):
        raise InputError(
            "attend_run needs q [B, Hq, Tq, Dk], k [B, Hk, N, Dk], v [B, Hk, N, Dv] with Hq a multiple of Hk"
            f"{_positions('N')}, got {_told(q, k, v, visible=visible)}"
        )
    return OPERATOR.on(q.device).attend_run(q, k, v, scale=scale, softcap=softcap, visible=visible)


def attend_pages(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
) -> Partial:
    """Softmax attention of queries over pages, each KV head over its own; frames that are not named are never read.

    Precision, threads and gradients as for :func:`attend_run`.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    k_arena, v_arena : Tensor
        [F, P, Dk] and [F, P, Dv]: F frames of P slots.
    frames : Tensor
        [B, Hk, N] int64: which frame holds page n of each KV head; every slot of a page takes part.
    scale, softcap
        As for :func:`attend_run`.
    visible : Visibility, optional
        q_pos [B, Tq] and k_pos [B, Hk or 1, N * P], pages end to end.

    Returns
    -------
    Partial
        out [B, Hq, Tq, Dv], lse [B, Hq, Tq].

    Raises
    ------
    InputError
        When shapes do not fit together.
    """
    if not (
        q.dim() == 4
        and frames.dim() == k_arena.dim() == v_arena.dim() == 3
        and k_arena.shape[:2] == v_arena.shape[:2]
        and q.shape[0] == frames.shape[0]
        and q.shape[3] == k_arena.shape[2]
        and frames.shape[1]
        and q.shape[1] % frames.shape[1] == 0
        and (visible is None or fits(visible, q, frames.shape[1], frames.shape[2] * k_arena.shape[1]))
    ):
        raise InputError(
            "attend_pages needs q [B, Hq, Tq, Dk], arenas [F, P, Dk] and [F, P, Dv], frames [B, Hk, N] with Hq a "
            f"multiple of Hk{_positions('N * P')}, got {_told(q, k_arena, v_arena, frames, visible=visible)}"
        )
    return OPERATOR.on(q.device).attend_pages(
        q, k_arena, v_arena, frames, scale=scale, softcap=softcap, visible=visible
    )


def _positions(keys: str) -> str:
    return f", and positions [B, Tq] and [B, Hk or 1, {keys}]"


def _told(*tensors: torch.Tensor, visible: Visibility | None) -> str:
    shapes = [list(tensor.shape) for tensor in tensors]
    if visible is not None:
        shapes += [list(visible.q_pos.shape), list(visible.k_pos.shape)]
    return ", ".join(map(str, shapes))
