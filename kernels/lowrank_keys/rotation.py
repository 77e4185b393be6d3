"""Rotary embedding as tables of cosines and sines by position (RoFormer, Su et al. 2021), halves of a head paired."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvtier.errors import InputError

__all__ = ["Rotation", "rotary_tables"]


class Rotation(NamedTuple):
    """Cosines and sines [S, R / 2] by position, of the first R channels: channel c turns with channel ``c + R / 2``.

    Tables of transformers repeat their halves: take ``cos[:, : R // 2]`` of them.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_tables(inv_freq: torch.Tensor, length: int, *, scaling: float = 1.0) -> Rotation:
    """Tables for positions 0 to ``length - 1``, as transformers computes them: angles in fp32, or fp64 for fp64.

    Parameters
    ----------
    inv_freq : Tensor
        [R / 2] radians a position.
    length : int
        Positions S.
    scaling : float
        Multiplies cosines and sines (YaRN's attention scaling).

    Raises
    ------
    InputError
        When the frequencies are not a row, or the length is negative.
    """
    if inv_freq.dim() != 1 or length < 0:
        raise InputError(
            f"rotary_tables needs inv_freq [R / 2] and a length of at least 0, got {list(inv_freq.shape)} and {length}"
        )
    wide = torch.promote_types(inv_freq.dtype, torch.float32)
    angles = torch.outer(torch.arange(length, dtype=wide, device=inv_freq.device), inv_freq.to(wide))
    return Rotation(angles.cos() * scaling, angles.sin() * scaling)
