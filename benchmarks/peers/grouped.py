"""The honest dense baseline: one matmul per KV head with its G query heads side by side, keys never repeated."""

from __future__ import annotations

import torch

from benchmarks.workload import KV, Shape

__all__ = ["exact_attention", "grouped_attention"]


def grouped_attention(query: torch.Tensor, held: KV, shape: Shape) -> torch.Tensor:
    """[Hk, G, D] x [Hk, D, T], softmax in fp32, x [Hk, T, D] -> [1, Hq, 1, D]."""
    grouped = query.view(shape.kv_heads, -1, shape.head_dim)
    weights = torch.softmax((grouped @ held.keys[0].mT).float() * shape.scale, dim=-1)
    return (weights.to(query.dtype) @ held.values[0]).view(query.shape)


def exact_attention(query: torch.Tensor, held: KV, shape: Shape) -> torch.Tensor:
    """The same in fp64, a KV head at a time: what others are compared with -> [1, Hq, 1, D] fp64."""
    grouped = query.view(shape.kv_heads, -1, shape.head_dim).double()
    heads = []
    for head in range(shape.kv_heads):
        weights = torch.softmax(grouped[head] @ held.keys[0, head].double().mT * shape.scale, dim=-1)
        heads.append(weights @ held.values[0, head].double())
    return torch.stack(heads).view(query.shape)
