"""Tensors that Hypothesis can shrink to few elements, most of them 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

__all__ = ["DTYPES", "draw_levels", "draw_values", "table"]

_MOST_BYTES = 120

DTYPES = (torch.float32, torch.bfloat16)


def draw_levels(draw: st.DrawFn, shape: Sequence[int], levels: int) -> torch.Tensor:
    """Integers from 0 to below ``levels`` (at most 256), int64 of this shape.

    A few bytes are drawn and laid out without a period, so that both they and the shape can shrink on their own.
    """
    drawn = np.frombuffer(draw(st.binary(min_size=1, max_size=_MOST_BYTES)), dtype=np.uint8).astype(np.int64)
    place = np.arange(math.prod(shape))
    return torch.from_numpy(drawn[(place * (place + 1) // 2 + place // drawn.size) % drawn.size] % levels).reshape(
        *shape
    )


def draw_values(draw: st.DrawFn, shape: Sequence[int]) -> torch.Tensor:
    """Multiples of 1/16 from -8 to 8, fp32; exact in bf16, and so are their products in fp32."""
    levels = draw_levels(draw, shape, 255)
    return torch.where(levels % 2 == 0, levels // 2, -(levels + 1) // 2).float() / 16


def table(name: str, values: torch.Tensor) -> str:
    """A small tensor in one line: its last axis as numbers, its other axes as indices."""
    if values.ndim == 1:
        return f"{name} {_line(values)}"
    rows = values.flatten(0, -2)
    places = [
        list(index)
        for index in torch.cartesian_prod(*map(torch.arange, values.shape[:-1])).reshape(rows.shape[0], -1).tolist()
    ]
    return "; ".join(f"{name}{place} {_line(row)}" for place, row in zip(places, rows, strict=True))


def _line(values: torch.Tensor) -> str:
    return " ".join(f"{value:g}" for value in values.tolist())
