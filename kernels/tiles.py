"""What the Triton kernels share: tile sizes, how many programs a device runs at once, and checks before a launch."""

from __future__ import annotations

import functools
import os
from typing import Final, NamedTuple

import torch

from kvtier.errors import InputError

__all__ = [
    "DEBUG_VARIABLE",
    "Launch",
    "attention_fits",
    "check_frames",
    "check_rows",
    "dense_channels",
    "interpreted",
    "launch_of",
    "padded",
    "processors",
    "triton_obstacle",
]

DEBUG_VARIABLE: Final = "KVTIER_DEBUG"
"""Set to 1: page ids are checked before every launch, at the price of waiting for the device."""
MOST_FP32_CHANNELS: Final = 128


class Launch(NamedTuple):
    """How a kernel is started.

    ``precision`` is that of products of fp32 (``"tf32x3"`` keeps fp32's 24 bits on tensor cores that have none);
    ``upcast`` converts 16-bit operands first, as Triton's interpreter needs: its bf16 arithmetic is silently wrong.
    """

    precision: str
    upcast: bool


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors; decided by ``TRITON_INTERPRET`` when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None when they can."""
    if device.type != "cuda":
        return "needs a GPU"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install 'kvtier[gpu]')"
    return None


def launch_of(device: torch.device) -> Launch:
    """How kernels are started for tensors on ``device``."""
    del device
    return Launch(precision="ieee" if torch.version.hip else "tf32x3", upcast=interpreted())


def dense_channels(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbouring channels next to each other: as it is, or copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(dim: int) -> int:
    """The tile width for ``dim`` channels: a power of two, and at least the 16 that a tensor core multiplies."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def check_frames(frames: torch.Tensor, count: int, *, slots: int = 1, lengths: torch.Tensor | None = None) -> None:
    """In debug mode refuse page ids [B, Hk, N] outside of an arena of ``count`` frames of ``slots`` slots.

    With ``lengths`` [B, Hk] only the pages that begin before them are looked at, and they must be lengths.

    Raises
    ------
    InputError
        Naming the least and the greatest.
    """
    if not _debugging():
        return
    if lengths is not None:
        pages = frames.shape[2]
        _check_range("lengths", lengths, pages * slots + 1, "there are no keys beyond the last page")
        frames = frames[torch.arange(pages, device=frames.device) * slots < lengths.unsqueeze(-1)]
    _check_range("frames", frames, count, "a page table is stale or damaged")


def check_rows(name: str, found: torch.Tensor, count: int) -> None:
    """In debug mode refuse numbers of rows, of any shape, that a table of ``count`` rows does not have.

    Raises
    ------
    InputError
        Naming the least and the greatest.
    """
    if _debugging():
        _check_range(name, found, count, "what is looked up must be there")


def attention_fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether attention kernels are for these: fp64 has no tensor cores here, and wide fp32 keys take all registers."""
    types = {q.dtype, k.dtype, v.dtype}
    if torch.float64 in types:
        return False
    return (len(types) == 1 and torch.float32 not in types) or max(k.shape[-1], v.shape[-1]) <= MOST_FP32_CHANNELS


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "0") == "1"


def _check_range(name: str, found: torch.Tensor, limit: int, hint: str) -> None:
    if not found.numel():
        return
    low, high = (int(bound) for bound in found.aminmax())
    if low < 0 or high >= limit:
        raise InputError(f"{name} must lie in [0, {limit}), got {low} to {high}; {hint}")
