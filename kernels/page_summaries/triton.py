"""Summaries of pages in Triton: a program reads one page once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvtier.kernels.page_summaries import blocked
from kvtier.kernels.tiles import dense_channels, padded

__all__ = ["page_bounds", "page_landmarks", "page_planes"]


@triton.jit
def page_bounds_kernel(
    k_ptr, kmin_ptr, kmax_ptr, stride_page, stride_slot,
    P: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Page [P, D] to kmin, kmax [D]."""
    i_page = tl.program_id(0).to(tl.int64)
    o_p, o_d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    # Slots beyond the page repeat the last one, so that no neutral number is needed.
    o_slot = tl.minimum(o_p, P - 1)
    p_k = k_ptr + i_page * stride_page + o_slot[:, None] * stride_slot + o_d[None, :]
    # Comparisons in fp32: exact for every 16-bit type, and the limits are numbers of that type again.
    b_k = tl.load(p_k, mask=(o_d < D)[None, :], other=0.0).to(tl.float32)
    tl.store(kmin_ptr + i_page * D + o_d, tl.min(b_k, 0).to(kmin_ptr.dtype.element_ty), mask=o_d < D)
    tl.store(kmax_ptr + i_page * D + o_d, tl.max(b_k, 0).to(kmax_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit
def page_landmarks_kernel(
    k_ptr, mean_ptr, stride_page, stride_slot,
    P: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Page [P, D] to its mean [D]."""
    i_page = tl.program_id(0).to(tl.int64)
    o_p, o_d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    p_k = k_ptr + i_page * stride_page + o_p[:, None] * stride_slot + o_d[None, :]
    b_k = tl.load(p_k, mask=(o_p < P)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    tl.store(mean_ptr + i_page * D + o_d, (tl.sum(b_k, 0) / P).to(mean_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit
def page_planes_kernel(
    k_ptr, kmin_ptr, kmax_ptr, planes_ptr, stride_page, stride_slot,
    P: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Page [P, D] to planes [BITS, P, W] of W = ceil(D / 8) bytes a slot."""
    W: tl.constexpr = (D + 7) // 8
    i_page = tl.program_id(0).to(tl.int64)
    o_p, o_w, o_j = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W), tl.arange(0, 8)
    o_d = o_w[:, None] * 8 + o_j[None, :]
    in_dim = o_d < D
    b_low = tl.load(kmin_ptr + i_page * D + o_d, mask=in_dim, other=0.0).to(tl.float32)
    b_span = tl.load(kmax_ptr + i_page * D + o_d, mask=in_dim, other=0.0).to(tl.float32) - b_low
    # A channel that is the same in every slot has no cells: its codes are 0.
    b_cells = tl.where(b_span > 0, tl.minimum(2**BITS / tl.where(b_span > 0, b_span, 1.0), 3.4e38), 0.0)
    p_k = k_ptr + i_page * stride_page + o_p[:, None, None] * stride_slot + o_d[None, :, :]
    b_k = tl.load(p_k, mask=(o_p < P)[:, None, None] & in_dim[None, :, :], other=0.0).to(tl.float32)
    b_code = tl.minimum(tl.maximum((b_k - b_low[None, :, :]) * b_cells[None, :, :], 0.0), 2.0**BITS - 1).to(tl.int32)
    p_planes = planes_ptr + i_page * (BITS * P * W) + o_p[:, None] * W + o_w[None, :]
    for plane in tl.static_range(BITS):
        b_bits = ((b_code >> (BITS - 1 - plane)) & 1) << (7 - o_j)[None, None, :]
        in_page = (o_p < P)[:, None] & (o_w < W)[None, :]
        tl.store(p_planes + plane * (P * W), tl.sum(b_bits, 2).to(tl.uint8), mask=in_page)


class _Pages(NamedTuple):
    """Pages [N, P, D] of keys, with the options that every kernel here takes."""

    keys: torch.Tensor
    options: dict[str, int]

    @classmethod
    def of(cls, k: torch.Tensor) -> _Pages:
        slots, dim = k.shape[-2:]
        return cls(
            dense_channels(k.reshape(-1, slots, dim)), {"P": slots, "D": dim, "BLOCK_P": 1 << (slots - 1).bit_length()}
        )


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds kmin and kmax [..., D] of pages k [..., P, D]."""
    if k.dtype == torch.float64 or not k.numel():
        return blocked.page_bounds(k)
    pages, options = _Pages.of(k)
    kmin, kmax = (k.new_empty(*k.shape[:-2], k.shape[-1]) for _ in range(2))
    page_bounds_kernel[(pages.shape[0],)](
        pages, kmin, kmax, *pages.stride()[:2], **options, BLOCK_D=padded(k.shape[-1]), num_warps=2
    )
    return kmin, kmax


def page_landmarks(k: torch.Tensor) -> torch.Tensor:
    """Means [..., D] of pages k [..., P, D]."""
    if k.dtype == torch.float64 or not k.numel():
        return blocked.page_landmarks(k)
    pages, options = _Pages.of(k)
    means = k.new_empty(*k.shape[:-2], k.shape[-1])
    page_landmarks_kernel[(pages.shape[0],)](
        pages, means, *pages.stride()[:2], **options, BLOCK_D=padded(k.shape[-1]), num_warps=2
    )
    return means


def page_planes(k: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, bits: int) -> torch.Tensor:
    """Planes [..., bits, P, ceil(D / 8)] of pages k [..., P, D] in their bounds [..., D]."""
    if torch.float64 in (k.dtype, kmin.dtype, kmax.dtype) or not k.numel():
        return blocked.page_planes(k, kmin, kmax, bits)
    pages, options = _Pages.of(k)
    words = -(-k.shape[-1] // 8)
    planes = k.new_empty(*k.shape[:-2], bits, k.shape[-2], words, dtype=torch.uint8)
    page_planes_kernel[(pages.shape[0],)](
        pages, kmin.contiguous(), kmax.contiguous(), planes, *pages.stride()[:2],
        **options, BITS=bits, BLOCK_W=1 << (words - 1).bit_length(), num_warps=2,
    )  # fmt: skip
    return planes
