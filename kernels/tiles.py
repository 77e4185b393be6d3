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
    "check_frames",
    "dense_channels",
    "interpreted",
    "launch_of",
    "padded",
    "processors",
    "triton_obstacle",
]

DEBUG_VARIABLE: Final = "KVTIER_DEBUG"
"""Set to 1: page ids are checked before every launch, at the price of waiting for the device."""


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


def check_frames(frames: torch.Tensor, count: int, *, what: str = "frames") -> None:
    """In debug mode refuse page ids outside of an arena of ``count`` frames, or whatever else is looked up by number.

    Raises
    ------
    InputError
        Naming the least and the greatest.
    """
    if os.environ.get(DEBUG_VARIABLE, "0") != "1" or not frames.numel():
        return
    low, high = (int(bound) for bound in frames.aminmax())
    if low < 0 or high >= count:
        raise InputError(f"{what} must lie in [0, {count}), got {low} to {high}; a page table is stale or damaged")
