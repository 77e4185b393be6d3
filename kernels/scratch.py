"""Scratch memory that a thread keeps from call to call: fresh memory of the system costs more than the work in it."""

from __future__ import annotations

import math
import threading
from typing import Final

import torch

__all__ = ["KEPT_BYTES", "release", "room", "scratch"]

KEPT_BYTES: Final = 32 * 2**20
"""The largest buffer that is kept; a larger one is allocated for the call and freed after it."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of a shape, the same for every call of this thread with this name.

    Whoever asks for a name again takes the memory from whoever had it before: nothing that a caller of kvtier sees may
    lie in it. On other devices than the CPU the allocator of torch does as well, and gets the request.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    return room(name, count, dtype)[:count].view(shape)


def room(name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory on the CPU for at least ``count`` elements, as for `scratch`; C code needs no exact view."""
    buffer = _kept.buffers.get((name, dtype))
    if buffer is None or buffer.numel() < count:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(count, dtype=dtype, device="cpu")
        if buffer.nbytes <= KEPT_BYTES:
            _kept.buffers[name, dtype] = buffer
    return buffer


def release() -> None:
    """Free what this thread keeps."""
    _kept.buffers.clear()
