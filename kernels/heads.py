"""Folding of batch and KV heads into one batch dimension H = B * Hk, and the types kernels accumulate in."""

from __future__ import annotations

import torch

__all__ = ["accumulation_dtype", "fold_bias", "fold_heads", "fold_queries"]


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 when one of the inputs is fp64, else fp32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def fold_heads(x: torch.Tensor) -> torch.Tensor | None:
    """View of x [B, Hk, ...] as [B * Hk, ...]; None where its strides allow none and a copy would be needed."""
    batch, heads = x.shape[:2]
    if batch == 1:
        return x[0]
    if heads == 1:
        return x[:, 0]
    return x.flatten(0, 1) if x.stride(0) == heads * x.stride(1) else None


def fold_queries(q: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries q [B, Hq, Tq, D] as [B * Hk, G, Tq, D] of ``dtype``, so that keys need not be repeated for the group."""
    batch, query_heads, queries, dim = q.shape
    return q.to(dtype).reshape(batch * kv_heads, query_heads // kv_heads, queries, dim)


def fold_bias(bias: torch.Tensor, folded_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Bias [B, Hk or Hq, N] as [B * Hk, 1 or G, N] of ``dtype``, for B * Hk ``folded_heads``."""
    batch, heads, keys = bias.shape
    return bias.to(dtype).reshape(folded_heads, batch * heads // max(folded_heads, 1), keys)
