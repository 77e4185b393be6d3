"""Tensors as bytes and back, for plain codecs: one behind the other, after the sizes of their block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, TypeAlias

import torch

from kvtier.core.policy import Encoded

__all__ = ["HEAD_BYTES", "Shape", "as_bytes", "head", "parts", "sizes"]

Shape: TypeAlias = tuple[int, ...]

HEAD_BYTES: Final = 32
_DTYPES: Final = (torch.float32, torch.bfloat16)


def as_bytes(*tensors: torch.Tensor) -> bytes:
    """Their elements."""
    return b"".join(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors)


def parts(data: bytes, *likes: tuple[torch.dtype, Shape]) -> Iterator[torch.Tensor]:
    """Tensors of these types and shapes from the beginning of ``data`` on."""
    at = 0
    for dtype, shape in likes:
        count = math.prod(shape)
        end = at + count * dtype.itemsize
        yield torch.frombuffer(bytearray(data[at:end]), dtype=dtype).reshape(shape) if count else torch.empty(shape)
        at = end


def head(block: torch.Tensor) -> bytes:
    """Shape and type of a block, in ``HEAD_BYTES`` bytes."""
    return as_bytes(torch.tensor([*block.shape, _DTYPES.index(block.dtype)]))


def sizes(encoded: Encoded) -> tuple[tuple[int, int, int], torch.dtype]:
    """Shape and type of the block of a header that begins with ``head``."""
    heads, tokens, dim, dtype = next(parts(encoded.header, (torch.int64, (4,)))).tolist()
    return (heads, tokens, dim), _DTYPES[dtype]
