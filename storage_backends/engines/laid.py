"""A transfer that was checked, with what its buffers were asked once: how long they are, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from kvtier.errors import InputError
from kvtier.storage_backends.engines.base import EngineFile, Transfer
from kvtier.storage_backends.engines.posix_file import BLOCK_BYTES

__all__ = ["Laid", "lay"]


class Laid(NamedTuple):
    """A transfer and its memory.

    ``aligned``: offset, addresses and lengths are as direct I/O asks. ``memory``: address and length of each buffer.
    """

    file: EngineFile
    offset: int
    buffers: Sequence[torch.Tensor]
    nbytes: int
    cuda: bool
    aligned: bool
    memory: Sequence[tuple[int, int]]

    def spans(self, start: int, stop: int) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Where bytes ``start`` to ``stop`` are: buffers, and from and to which byte of each."""
        for buffer, (_, size) in zip(self.buffers, self.memory, strict=True):
            if start < size and stop > 0:
                yield buffer, max(start, 0), min(stop, size)
            start, stop = start - size, stop - size

    def within(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        """Addresses and lengths of bytes ``start`` to ``stop``."""
        if stop - start == self.nbytes:
            return self.memory
        return [(buffer.data_ptr() + low, high - low) for buffer, low, high in self.spans(start, stop)]


def lay(transfer: Transfer) -> Laid:
    """Check a transfer and find its memory.

    Raises
    ------
    InputError
        A buffer is no contiguous uint8 vector, or the offset is negative.
    """
    file, offset, first, behind = transfer
    if offset < 0:
        raise InputError(f"offsets must be at least 0, got {offset}")
    buffers = (first, *behind)
    memory = []
    total, bits, cuda = 0, offset, False
    for buffer in buffers:
        if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous() or buffer.is_meta:
            raise InputError(
                f"buffers must be contiguous uint8 vectors, got {buffer.dtype} {list(buffer.shape)} on "
                f"{buffer.device}; view them as bytes"
            )
        address, size = buffer.data_ptr(), buffer.numel()
        memory.append((address, size))
        total += size
        bits |= address | size
        cuda = cuda or buffer.is_cuda
    if cuda and behind:
        raise InputError("several buffers of one transfer must lie in host memory, got one on a GPU; split it")
    return Laid(file, offset, buffers, total, cuda, not bits % BLOCK_BYTES, memory)
