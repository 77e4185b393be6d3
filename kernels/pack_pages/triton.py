"""Pages into rows and back in Triton: a program copies a piece of one page, keys and values in the same launch."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from kvtier.kernels.tiles import check_frames

__all__ = ["pack_pages", "unpack_pages"]

_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE_BYTES: Final = 8192


@triton.jit
def pages_kernel(
    k_ptr, v_ptr, frames_ptr, rows_ptr, stride_kf, stride_vf,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Words ``piece * BLOCK`` on of a row [KEYS + VALUES] from a frame's page, or to it."""
    i_n = tl.program_id(0).to(tl.int64)
    i_f = tl.load(frames_ptr + i_n)
    o_word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_key = o_word < KEYS
    is_value = (o_word >= KEYS) & (o_word < KEYS + VALUES)
    p_key, p_value = k_ptr + i_f * stride_kf + o_word, v_ptr + i_f * stride_vf + (o_word - KEYS)
    p_row = rows_ptr + i_n * (KEYS + VALUES) + o_word
    if PACK:
        tl.store(p_row, tl.load(p_key, mask=is_key, other=0), mask=is_key)
        tl.store(p_row, tl.load(p_value, mask=is_value, other=0), mask=is_value)
    else:
        tl.store(p_key, tl.load(p_row, mask=is_key, other=0), mask=is_key)
        tl.store(p_value, tl.load(p_row, mask=is_value, other=0), mask=is_value)


def pack_pages(k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, rows: torch.Tensor) -> None:
    """Fill rows [n, P * (Dk + Dv)] with frames [n]."""
    _launch(k_arena, v_arena, frames, rows, pack=True)


def unpack_pages(rows: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor) -> None:
    """Fill frames [n] with rows [n, P * (Dk + Dv)]."""
    _launch(k_arena, v_arena, frames, rows, pack=False)


def _launch(
    k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, rows: torch.Tensor, *, pack: bool
) -> None:
    check_frames(frames, len(k_arena))
    # Nothing is computed: any type travels as words of its size, NaN and all.
    word = _WORDS[k_arena.element_size()]
    keys, values = k_arena.shape[1] * k_arena.shape[2], v_arena.shape[1] * v_arena.shape[2]
    most = PIECE_BYTES // k_arena.element_size()
    block = min(most, max(16, 1 << (keys + values - 1).bit_length()))
    pages_kernel[(len(frames), -(-(keys + values) // block))](
        k_arena.view(word), v_arena.view(word), frames.to(k_arena.device), rows.view(word),
        k_arena.stride(0), v_arena.stride(0),
        KEYS=keys, VALUES=values, BLOCK=block, PACK=pack, num_warps=4,
    )  # fmt: skip
