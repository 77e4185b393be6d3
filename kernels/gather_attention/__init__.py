"""Attention over a run of keys, or over pages of an arena, as a partial (FlashAttention, Dao et al. 2022)."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.gather_attention import blocked, reference
from kvtier.kernels.gather_attention.extras import PLAIN, Extras, check_extras
from kvtier.kernels.spans import fits
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import Partial, Tree, Visibility

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
        extras: Extras = PLAIN,
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
        extras: Extras = PLAIN,
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
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    tree: Tree | None = None,
    unified_max: float | None = None,
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
    bias : Tensor, optional
        [B, Hk or Hq, N], any floating type: added to the logits of a key after scale and softcap. -inf hides the key,
        ``ln n`` counts it n times.
    lengths : Tensor, optional
        [B, Hk] int64: KV head h has the first ``lengths[b, h]`` of the N keys. The others are never read.
    tree : Tree, optional
        The last keys are drafted tokens, at most 64, each seen only by the queries that descend from it.
    unified_max : float, optional
        A number near the greatest logit of every query, used in its place where that saves time (FlashDecoding++, Hong
        et al. 2024, section 3). It changes no answer: where it is too far off, the usual softmax is computed after all.

    Returns
    -------
    Partial
        out [B, Hq, Tq, Dv], lse [B, Hq, Tq]; ``(0, -inf)`` for a query that sees no key.

    Raises
    ------
    InputError
        When shapes do not fit together, or a length is out of range (on a GPU only with ``KVTIER_DEBUG=1``).
    """
    if not _run_fits(q, k, v, visible):
        raise InputError(
            "attend_run needs q [B, Hq, Tq, Dk], k [B, Hk, N, Dk], v [B, Hk, N, Dv] with Hq a multiple of Hk"
            f"{_positions('N')}, got {_told(q, k, v, visible=visible)}"
        )
    extras = _extras(q, k.shape[1], k.shape[2], bias, lengths, tree, unified_max)
    return OPERATOR.on(q.device).attend_run(q, k, v, scale=scale, softcap=softcap, visible=visible, extras=extras)


def attend_pages(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    tree: Tree | None = None,
    unified_max: float | None = None,
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
    bias, lengths, tree, unified_max
        As for :func:`attend_run`, with N * P keys, pages end to end. ``lengths`` make page lists ragged: a page that
        begins at or after the length of its head is not read, and its frame may be any number.

    Returns
    -------
    Partial
        out [B, Hq, Tq, Dv], lse [B, Hq, Tq].

    Raises
    ------
    InputError
        When shapes do not fit together, or a length is out of range (on a GPU only with ``KVTIER_DEBUG=1``).
    """
    if not _pages_fit(q, k_arena, v_arena, frames, visible):
        raise InputError(
            "attend_pages needs q [B, Hq, Tq, Dk], arenas [F, P, Dk] and [F, P, Dv], frames [B, Hk, N] with Hq a "
            f"multiple of Hk{_positions('N * P')}, got {_told(q, k_arena, v_arena, frames, visible=visible)}"
        )
    extras = _extras(q, frames.shape[1], frames.shape[2] * k_arena.shape[1], bias, lengths, tree, unified_max)
    return OPERATOR.on(q.device).attend_pages(
        q, k_arena, v_arena, frames, scale=scale, softcap=softcap, visible=visible, extras=extras
    )


def _extras(
    q: torch.Tensor,
    kv_heads: int,
    keys: int,
    bias: torch.Tensor | None,
    lengths: torch.Tensor | None,
    tree: Tree | None,
    unified_max: float | None,
) -> Extras:
    """The options of a call, checked."""
    if bias is None and lengths is None and tree is None and unified_max is None:
        return PLAIN
    extras = Extras(bias, lengths, tree, unified_max)
    check_extras(extras, q, kv_heads, keys)
    return extras


def _run_fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility | None) -> bool:
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    return bool(
        len(q_shape) == len(k_shape) == len(v_shape) == 4
        and k_shape[:3] == v_shape[:3]
        and q_shape[0] == k_shape[0]
        and q_shape[3] == k_shape[3]
        and k_shape[1]
        and q_shape[1] % k_shape[1] == 0
        and (visible is None or fits(visible, q, k_shape[1], k_shape[2]))
    )


def _pages_fit(
    q: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, visible: Visibility | None
) -> bool:
    return bool(
        q.dim() == 4
        and frames.dim() == k_arena.dim() == v_arena.dim() == 3
        and k_arena.shape[:2] == v_arena.shape[:2]
        and q.shape[0] == frames.shape[0]
        and q.shape[3] == k_arena.shape[2]
        and frames.shape[1]
        and q.shape[1] % frames.shape[1] == 0
        and (visible is None or fits(visible, q, frames.shape[1], frames.shape[2] * k_arena.shape[1]))
    )


def _positions(keys: str) -> str:
    return f", and positions [B, Tq] and [B, Hk or 1, {keys}]"


def _told(*tensors: torch.Tensor, visible: Visibility | None) -> str:
    shapes = [list(tensor.shape) for tensor in tensors]
    if visible is not None:
        shapes += [list(visible.q_pos.shape), list(visible.k_pos.shape)]
    return ", ".join(map(str, shapes))
