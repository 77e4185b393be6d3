"""Keys from low-rank factors, dense and in one piece: the truth that the fast path is compared with."""

from __future__ import annotations

import torch

from kvtier.kernels.lowrank_keys.rotation import Rotation

__all__ = ["lowrank_keys"]


def lowrank_keys(
    u: torch.Tensor,
    sv: torch.Tensor,
    positions: torch.Tensor,
    pages: torch.Tensor,
    rotation: Rotation,
    *,
    page_tokens: int,
) -> torch.Tensor:
    """Gather rows [B, Hk, M, r], one product, then ``k cos + rotate_half(k) sin`` over the rotated channels."""
    wide = torch.float64 if torch.float64 in (u.dtype, sv.dtype, rotation.cos.dtype) else torch.float32
    slots = torch.arange(page_tokens, device=pages.device)
    tokens = (pages.unsqueeze(-1) * page_tokens + slots).flatten(2)
    rows = torch.arange(u.shape[0], device=u.device)[:, None, None]
    keys = torch.einsum("bhnr,bhrd->bhnd", u[rows, tokens].to(wide), sv.to(wide))
    place = positions[rows, tokens]
    cos, sin = (table.to(wide)[place].repeat(1, 1, 1, 2) for table in rotation)
    turned, still = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, still], dim=-1).to(u.dtype)
