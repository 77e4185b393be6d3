"""Keys from low-rank factors in blocks of tokens that stay in the cache: gather, multiply, rotate, next."""

from __future__ import annotations

from typing import Final

import torch

from kvtier.kernels.heads import accumulation_dtype, fold_heads
from kvtier.kernels.lowrank_keys.rotation import Rotation
from kvtier.kernels.scratch import scratch

__all__ = ["lowrank_keys"]

CACHE_BYTES: Final = 2 * 2**20
DEVICE_BYTES: Final = 256 * 2**20


def lowrank_keys(
    u: torch.Tensor,
    sv: torch.Tensor,
    positions: torch.Tensor,
    pages: torch.Tensor,
    rotation: Rotation,
    *,
    page_tokens: int,
) -> torch.Tensor:
    """Keys [B, Hk, N * P, D]; before rotation they exist a block at a time."""
    batch, kv_heads, rank, dim = sv.shape
    rows = fold_heads(u)
    if rows is None:
        rows = u.reshape(-1, rank)
    dtype = accumulation_dtype(u, sv, rotation.cos)
    slots = torch.arange(page_tokens, device=pages.device)
    starts = torch.arange(batch, device=pages.device).view(-1, 1, 1) * u.shape[1]
    tokens = (pages.unsqueeze(-1) * page_tokens + slots).flatten(2).add_(starts).flatten(0, 1)
    basis = sv.to(dtype).reshape(-1, rank, dim)
    keys = u.new_empty(batch * kv_heads, tokens.shape[1], dim)
    for part in _blocks(tokens, rank + 2 * dim, dtype):
        wanted = tokens[:, part].flatten()
        shape = (batch * kv_heads, -1, rank)
        coefficients = _gathered("coefficients", rows, wanted, dtype).view(shape)
        plain = scratch("plain keys", (*coefficients.shape[:2], dim), dtype, u.device)
        torch.bmm(coefficients, basis, out=plain)
        place = positions.flatten().index_select(0, wanted)
        cos, sin = (_gathered(name, table, place, dtype) for name, table in zip(("cos", "sin"), rotation, strict=True))
        _rotate(plain, cos.view(*plain.shape[:2], -1), sin.view(*plain.shape[:2], -1), keys[:, part])
    return keys.view(batch, kv_heads, -1, dim)


def _blocks(tokens: torch.Tensor, token_numbers: int, dtype: torch.dtype) -> list[slice]:
    """Ranges of tokens [H, M] of so many numbers each that stay in the cache."""
    budget = CACHE_BYTES if tokens.device.type == "cpu" else DEVICE_BYTES
    block = max(64, budget // max(1, tokens.shape[0] * token_numbers * dtype.itemsize))
    return [slice(at, at + block) for at in range(0, tokens.shape[1], block)]


def _gathered(name: str, rows: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows [M, n] of a table, of ``dtype``, in scratch memory."""
    shape = (wanted.shape[0], rows.shape[1])
    found = scratch(f"{name} as stored", shape, rows.dtype, rows.device)
    torch.index_select(rows, 0, wanted, out=found)
    return found if rows.dtype == dtype else scratch(name, shape, dtype, rows.device).copy_(found)


def _rotate(plain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor) -> None:
    """Write plain [H, n, D], turned by cos and sin [H, n, R / 2], to keys."""
    half = cos.shape[-1]
    first, second = plain[..., :half], plain[..., half : 2 * half]
    keys[..., :half] = torch.mul(first, cos).addcmul_(second, sin, value=-1)
    keys[..., half : 2 * half] = torch.mul(second, cos).addcmul_(first, sin)
    keys[..., 2 * half :] = plain[..., 2 * half :]
