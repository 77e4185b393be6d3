"""Rotations of queries and keys by position: as a model made them, undone, moved on, and averaged."""

from __future__ import annotations

import torch

from kvtier.types import Rope

__all__ = ["mean_rotation", "turned", "unrotated"]


def turned(rope: Rope, vectors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Vectors [..., n, Dk] as if their positions were ``tokens`` [n] or [..., n] further on; negative ones go back.

    Angles are computed in fp64: far positions do not blur.
    """
    angles = _angles(rope, tokens.to(device=vectors.device))
    wide = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    return _rotated(vectors.to(wide), angles.cos().to(wide), angles.sin().to(wide)).to(vectors.dtype)


def unrotated(rope: Rope, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Vectors [..., n, Dk] at positions [n] before the model rotated them, at least in fp32.

    The cosines and sines are those of the model, rounded as it rounds them; dividing by the sum of their squares undoes
    the rounding, and the scaling of YaRN.
    """
    wide = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    frequencies = torch.tensor(rope.frequencies, dtype=wide, device=vectors.device)
    angles = positions.to(device=vectors.device, dtype=wide)[..., None] * frequencies
    cos, sin = ((part * rope.scaling).to(vectors.dtype).to(wide) for part in (angles.cos(), angles.sin()))
    size = cos.square() + sin.square()
    return _rotated(vectors.to(wide), cos / size, -sin / size)


def mean_rotation(rope: Rope, positions: torch.Tensor, key_dim: int) -> torch.Tensor:
    """The mean of the rotations to these positions [n], as a matrix [Dk, Dk] fp32 that multiplies from the left."""
    angles, pairs = _angles(rope, positions), len(rope.frequencies)
    cos, sin = ((part.mean(0) * rope.scaling).float() for part in (angles.cos(), angles.sin()))
    matrix = torch.eye(key_dim, device=positions.device)
    low = torch.arange(pairs, device=positions.device)
    high = low + pairs
    matrix[low, low] = matrix[high, high] = cos
    matrix[low, high], matrix[high, low] = -sin, sin
    return matrix


def _angles(rope: Rope, tokens: torch.Tensor) -> torch.Tensor:
    """Radians [..., pairs] fp64 of so many tokens [...]."""
    return tokens.to(torch.float64)[..., None] * torch.tensor(
        rope.frequencies, dtype=torch.float64, device=tokens.device
    )


def _rotated(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Vectors [..., Dk] whose pairs are multiplied by cos + i sin [..., pairs]."""
    pairs = cos.shape[-1]
    low, high, rest = vectors[..., :pairs], vectors[..., pairs : 2 * pairs], vectors[..., 2 * pairs :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)
