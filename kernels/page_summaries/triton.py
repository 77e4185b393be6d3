"""Bounds of pages in Triton: a program reads one page once and keeps both limits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtier.kernels.page_summaries import blocked
from kvtier.kernels.tiles import padded

__all__ = ["page_bounds"]


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


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds kmin and kmax [..., D] of pages k [..., P, D]."""
    slots, dim = k.shape[-2:]
    if k.dtype == torch.float64 or not k.numel():
        return blocked.page_bounds(k)
    pages = k.reshape(-1, slots, dim)
    if pages.stride(2) != 1:
        pages = pages.contiguous()
    kmin, kmax = (k.new_empty(*k.shape[:-2], dim) for _ in range(2))
    page_bounds_kernel[(pages.shape[0],)](
        pages, kmin, kmax, pages.stride(0), pages.stride(1),
        P=slots, D=dim, BLOCK_P=1 << (slots - 1).bit_length(), BLOCK_D=padded(dim), num_warps=2,
    )  # fmt: skip
    return kmin, kmax
