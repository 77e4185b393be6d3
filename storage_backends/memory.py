"""Host memory for slots: page-aligned mappings, page-locked where CUDA can, given back to the system when closed.

torch's own pinned allocator rounds sizes up to a power of two and keeps freed memory for later, so a tier on top of it
could not keep its byte budget. A private mapping registered with CUDA is exact and really goes away.
"""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvtier.errors import CapacityError
from kvtier.storage_backends.slots import Rows
from kvtier.types import format_bytes

__all__ = [
    "HUGE_PAGE_BYTES",
    "PAGE_BYTES",
    "ByteRows",
    "PinnedRegion",
    "copy_rows",
    "empty_aligned",
    "empty_huge",
    "round_up",
]

PAGE_BYTES = 4096

ByteRows: TypeAlias = npt.NDArray[np.uint8]

HUGE_PAGE_BYTES = 2 << 20
_CACHED_BYTES = 256 << 10
_logger = logging.getLogger("kvtier.storage_backends.memory")


def round_up(count: int, multiple: int) -> int:
    """Round ``count`` up to the next multiple of ``multiple``."""
    return -(-count // multiple) * multiple


def empty_aligned(size: int) -> torch.Tensor:
    """Zeroed pageable host memory uint8 [size] that starts at a page boundary; lives as long as the tensor.

    Raises
    ------
    CapacityError
        The system has no such memory to give.
    """
    try:
        mapping = mmap.mmap(-1, round_up(max(1, size), PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"required {format_bytes(size)} of host memory, which the system refused ({error}); lower the capacity of "
            "the host tier"
        ) from error
    if size >= HUGE_PAGE_BYTES:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)[:size]


def empty_huge(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of a shape; on a CPU, where there is enough of it, in huge pages.

    What is read here and there would else cost the CPU a walk through its page tables for every 4 KiB, and so does what
    is streamed once a step.

    Raises
    ------
    CapacityError
        The system has no such memory to give.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return empty_aligned(nbytes).view(dtype).view(shape)


def copy_rows(source: ByteRows, taken: Rows, target: ByteRows, put: Rows) -> None:
    """Copy rows ``taken`` of ``source`` [n, width] to rows ``put`` of ``target`` [m, width]; indices must be in range.

    Notes
    -----
    One thread, the interpreter lock released. torch would start a pool of OpenMP threads in every thread that calls it,
    which then fight with those of the model.
    """
    if isinstance(taken, slice):
        target[put] = source[taken]
    elif isinstance(put, slice):
        np.take(source, taken, axis=0, out=target[put], mode="clip")  # any other mode copies by way of a temporary
    else:
        step = max(1, _CACHED_BYTES // source.shape[1])
        cached = np.empty((step, source.shape[1]), dtype=np.uint8)
        for at in range(0, taken.size, step):
            some = taken[at : at + step]
            target[put[at : at + step]] = np.take(source, some, axis=0, out=cached[: some.size], mode="clip")


class PinnedRegion:
    """Page-aligned host memory, page-locked when CUDA is there and agrees.

    Attributes
    ----------
    bytes : torch.Tensor
        The memory, uint8 [size].
    held_bytes : int
        What it takes, whole pages.
    pinned : bool
        Whether CUDA locked it; if not, it is ordinary pageable memory.

    Raises
    ------
    CapacityError
        The system has no such memory to give.
    """

    def __init__(self, size: int) -> None:
        self.bytes = empty_aligned(size)
        self.held_bytes = round_up(size, PAGE_BYTES)
        self.pinned = _pin(self.bytes)

    def close(self) -> None:
        """Unlock the memory; it goes back to the system with the last tensor that views it. Idempotent."""
        if self.pinned:
            _cuda_runtime().cudaHostUnregister(self.bytes.data_ptr())
            self.pinned = False
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.held_bytes = 0


def _pin(memory: torch.Tensor) -> bool:
    """Lock the pages for device copies; False, and a line in the log, when that cannot be had."""
    if not torch.cuda.is_available():
        return False
    try:
        status = int(_cuda_runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    except RuntimeError as error:
        reason = str(error)
    else:
        reason = f"CUDA error {status}"
        if status == 0:
            return True
    _logger.warning("host memory stays pageable: %s could not be pinned (%s)", format_bytes(memory.numel()), reason)
    return False


def _cuda_runtime() -> Any:
    """Load the CUDA runtime that torch brings; its functions have no types."""
    load: Callable[[], Any] = torch.cuda.cudart
    return load()
