"""The payload of a saved session: arrays written one after the other, and read back verified, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from kvtier.core.policy import IntArray
from kvtier.core.saved.description import ARRAY_ALIGNMENT, Array
from kvtier.errors import RecordFormatError
from kvtier.record import BLOCK_BYTES, DEFAULT_EXTENT_BYTES, DIGEST_BYTES, digest_extents
from kvtier.storage_backends.engines.base import EngineFile, IOEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned, round_up

if TYPE_CHECKING:
    from kvtier.core.group import LayerGroup

__all__ = ["PayloadReader", "PayloadWriter", "read_at", "read_memory", "require", "write_at"]

_PIECE_BYTES = 4 << 20


class PayloadWriter:
    """Appends arrays to a file, behind its first block.

    Attributes
    ----------
    digests : bytearray
        Of the extents written so far.
    written : int
        Bytes of the payload so far.
    """

    def __init__(self, engine: IOEngine, file: EngineFile) -> None:
        self._engine, self._file = engine, file
        self._buffer = empty_aligned(_PIECE_BYTES)
        self._filled = 0
        self._flushed = 0
        self.digests = bytearray()

    @property
    def written(self) -> int:
        """Bytes of the payload."""
        return self._flushed + self._filled

    def put(self, tensor: torch.Tensor | IntArray) -> Array:
        """Append one array."""
        whole = tensor if isinstance(tensor, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(tensor))
        return self.stream(tuple(whole.shape), whole.dtype, [whole])

    def stream(self, shape: Sequence[int], dtype: torch.dtype, parts: Iterable[torch.Tensor]) -> Array:
        """Append one array that comes in parts, along its first dimension."""
        self._add(torch.zeros(-self.written % ARRAY_ALIGNMENT, dtype=torch.uint8))
        array = Array.model_validate(
            {"dtype": str(dtype).removeprefix("torch."), "shape": tuple(shape), "at": self.written}
        )
        for part in parts:
            self._add(part.detach().cpu().contiguous().flatten().view(torch.uint8))
        return array

    def finish(self) -> int:
        """Fill the last block and write what is left; bytes of the payload."""
        self._add(torch.zeros(-self.written % BLOCK_BYTES, dtype=torch.uint8))
        self._flush()
        return self._flushed

    def _add(self, data: torch.Tensor) -> None:
        done = 0
        while done < data.numel():
            part = min(data.numel() - done, _PIECE_BYTES - self._filled)
            self._buffer[self._filled : self._filled + part] = data[done : done + part]
            self._filled += part
            done += part
            if self._filled == _PIECE_BYTES:
                self._flush()

    def _flush(self) -> None:
        if self._filled:
            held = self._buffer[: self._filled]
            self.digests += digest_extents(held.numpy().data, DEFAULT_EXTENT_BYTES)
            write_at(self._engine, self._file, BLOCK_BYTES + self._flushed, held)
            self._flushed += self._filled
            self._filled = 0


class PayloadReader:
    """Reads arrays of a payload; no byte is handed out before the extents it lies in are verified."""

    def __init__(self, engine: IOEngine, file: EngineFile, size: int, digests: bytes, extent_bytes: int) -> None:
        self._engine, self._file = engine, file
        self._size, self._digests, self._extent = size, digests, extent_bytes

    def check(self, arrays: Iterable[Array]) -> None:
        """Refuse arrays that do not lie in the payload, or say together that they are more than it.

        Raises
        ------
        RecordFormatError
        """
        left = self._size
        for array in arrays:
            left -= array.nbytes
            if array.at % ARRAY_ALIGNMENT or array.at + array.nbytes > self._size or left < 0:
                raise RecordFormatError(
                    f"an array of {list(array.shape)} {array.dtype} at byte {array.at} has no place in a payload of "
                    f"{self._size} bytes"
                )

    def read(self, array: Array) -> torch.Tensor:
        """All of an array, on the CPU."""
        return next(self.pieces(array, max(1, array.shape[0]))) if array.nbytes else _empty(array)

    def pieces(self, array: Array, rows: int) -> Iterator[torch.Tensor]:
        """The array, ``rows`` entries of its first dimension at a time."""
        for start in range(0, array.shape[0], rows):
            count = min(rows, array.shape[0] - start)
            data = self._verified(array.at + start * array.row_bytes, count * array.row_bytes)
            yield data.view(_dtype(array)).reshape(count, *array.shape[1:])

    def _verified(self, start: int, count: int) -> torch.Tensor:
        """Bytes of the payload, after the digests of all extents they lie in.

        Raises
        ------
        RecordFormatError, OSError
        """
        first = start // self._extent
        begin, end = first * self._extent, min(round_up(start + count, self._extent), self._size)
        data = read_at(self._engine, self._file, BLOCK_BYTES + begin, end - begin)
        for number, at in enumerate(range(0, end - begin, self._extent), start=first):
            found = xxhash.xxh3_128_digest(data[at : at + self._extent].numpy().data)
            if found != self._digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]:
                raise RecordFormatError(f"extent {number} of the payload is damaged: its digest does not match")
        return data[start - begin : start - begin + count]


def require(array: Array, dtype: str, shape: Sequence[int | None]) -> None:
    """Refuse an array of another type or shape; None stands for any length.

    Raises
    ------
    RecordFormatError
    """
    fits = len(array.shape) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        wanted = ["any" if length is None else length for length in shape]
        raise RecordFormatError(f"an array must be {dtype} {wanted}, got {array.dtype} {list(array.shape)}")


def read_memory(payload: PayloadReader, array: Array | None, group: LayerGroup) -> torch.Tensor | None:
    """What a policy remembers of its last merge [1, Hk, S], on the device of a group."""
    if array is None:
        return None
    require(array, array.dtype, (1, group.heads, None))
    return payload.read(array).to(group.device)


def write_at(engine: IOEngine, file: EngineFile, offset: int, data: torch.Tensor) -> None:
    """Write uint8 [n]; OSError when that fails."""
    for error in engine.write([Transfer(file, offset, data)]):
        if error is not None:
            raise error


def read_at(engine: IOEngine, file: EngineFile, offset: int, count: int) -> torch.Tensor:
    """Read uint8 [count], which the file must have; OSError when that fails."""
    data = empty_aligned(count)
    for error in engine.read([Transfer(file, offset, data)]):
        if error is not None:
            raise error
    return data


def _dtype(array: Array) -> torch.dtype:
    found: torch.dtype = getattr(torch, array.dtype)
    return found


def _empty(array: Array) -> torch.Tensor:
    return torch.empty(array.shape, dtype=_dtype(array))
