"""Attention over encoded blocks of arenas, dequantised on the way into the product, as a partial."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.encoded_attention import blocked, reference
from kvtier.kernels.encoded_attention.formats import BlockFormat
from kvtier.kernels.encoded_attention.formats.base import ALIGNMENT
from kvtier.kernels.gather_attention.extras import Extras, check_extras
from kvtier.kernels.spans import fits
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import Partial, Visibility

__all__ = ["attend_encoded"]


class EncodedAttention(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def attend_encoded(
        self,
        q: torch.Tensor,
        k_arena: torch.Tensor,
        v_arena: torch.Tensor,
        frames: torch.Tensor,
        /,
        *,
        k_format: BlockFormat,
        v_format: BlockFormat,
        scale: float,
        softcap: float | None,
        visible: Visibility | None,
        lengths: torch.Tensor | None,
    ) -> Partial:
        """Attention over encoded blocks."""


def _triton() -> EncodedAttention:
    from kvtier.kernels.encoded_attention import triton

    return triton


OPERATOR: Final = Operator[EncodedAttention](
    "encoded_attention",
    [
        Candidate("triton", _triton, "codes come apart in registers, nothing is decoded to memory", triton_obstacle),
        Candidate("blocked", lambda: blocked, "decodes blocks into the cache, fastest in plain torch"),
        Candidate("reference", lambda: reference, "decodes everything, dense"),
    ],
)


def attend_encoded(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    k_format: BlockFormat,
    v_format: BlockFormat,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
    lengths: torch.Tensor | None = None,
) -> Partial:
    """Softmax attention of queries over what encoded blocks decode to, each KV head over its own.

    Computed as if in fp32 (fp64 where q is), except that GPUs multiply q of other types than bf16, and all weights, in
    two bf16 parts: 16 bits of each. Threads and gradients as for :func:`kvtier.kernels.gather_attention.attend_pages`.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    k_arena, v_arena : Tensor
        uint8 [F, k_format.block_bytes] and [F, v_format.block_bytes]: F frames, each at a multiple of 16 bytes; they
        may be views into one arena.
    frames : Tensor
        [B, Hk, N] int64: which frame holds block n of each KV head; frames that are not named are never read.
    k_format, v_format : BlockFormat
        Any two of as many slots each, of Dk and Dv channels.
    scale, softcap, visible
        As for :func:`kvtier.kernels.gather_attention.attend_pages`, with N * slots keys, blocks end to end.
    lengths : Tensor, optional
        [B, Hk] int64: KV head h has the first ``lengths[b, h]`` of the keys. A block that begins at or after that is
        not read, and its frame may be any number.

    Returns
    -------
    Partial
        out [B, Hq, Tq, Dv], lse [B, Hq, Tq]; ``(0, -inf)`` for a query that sees no key.

    Raises
    ------
    InputError
        When shapes do not fit together, frames are not aligned, or a length is out of range (on a GPU only with
        ``KVTIER_DEBUG=1``).
    """
    _check_shapes(q, k_arena, v_arena, frames, k_format, v_format, visible)
    check_extras(Extras(lengths=lengths), q, frames.shape[1], frames.shape[2] * k_format.slots)
    return OPERATOR.on(q.device).attend_encoded(
        q,
        k_arena,
        v_arena,
        frames,
        k_format=k_format,
        v_format=v_format,
        scale=scale,
        softcap=softcap,
        visible=visible,
        lengths=lengths,
    )


def _check_shapes(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    k_format: BlockFormat,
    v_format: BlockFormat,
    visible: Visibility | None,
) -> None:
    if not (
        q.dim() == 4
        and frames.dim() == 3
        and k_arena.dim() == v_arena.dim() == 2
        and k_arena.shape == (len(k_arena), k_format.block_bytes)
        and v_arena.shape == (len(k_arena), v_format.block_bytes)
        and k_format.slots == v_format.slots
        and q.shape[0] == frames.shape[0]
        and q.shape[3] == k_format.dim
        and frames.shape[1]
        and q.shape[1] % frames.shape[1] == 0
        and (visible is None or fits(visible, q, frames.shape[1], frames.shape[2] * k_format.slots))
    ):
        shapes = [list(tensor.shape) for tensor in (q, k_arena, v_arena, frames)]
        shapes += [] if visible is None else [list(visible.q_pos.shape), list(visible.k_pos.shape)]
        raise InputError(
            f"attend_encoded needs q [B, Hq, Tq, {k_format.dim}], arenas [F, {k_format.block_bytes}] and "
            f"[F, {v_format.block_bytes}], frames [B, Hk, N] with Hq a multiple of Hk, positions [B, Tq] and "
            f"[B, Hk or 1, N * slots], and formats of as many slots, got {', '.join(map(str, shapes))} and "
            f"{k_format.slots} and {v_format.slots} slots"
        )
    for arena in (k_arena, v_arena):
        apart = arena.stride(1) != 1 or arena.stride(0) % ALIGNMENT or arena.storage_offset() % ALIGNMENT
        if arena.dtype != torch.uint8 or apart:
            raise InputError(
                f"arenas of encoded blocks must be uint8 with frames at multiples of {ALIGNMENT} bytes, got "
                f"{arena.dtype} with strides {arena.stride()} from byte {arena.storage_offset()} on"
            )
