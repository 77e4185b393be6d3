"""One simulated file: what is on the medium for sure, and the changes that may or may not have reached it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["FileChange", "SimulatedFile"]


@dataclass(slots=True, eq=False)
class FileChange:
    """Bytes written at ``offset``, or, without bytes, the file cut or grown to ``offset`` bytes."""

    offset: int
    data: memoryview | None
    complete: bool = False

    def size_after(self, size: int) -> int:
        """Bytes of the file once this has happened."""
        return self.offset if self.data is None else max(size, self.offset + len(self.data))


@dataclass(slots=True, eq=False)
class SimulatedFile:
    """A file of a `SimulatedDisk`.

    Attributes
    ----------
    durable : bytearray
        What a power loss cannot take.
    pending : list of FileChange
        What it can, in the order in which the calls began.
    """

    durable: bytearray
    pending: list[FileChange] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the file as its readers see it."""
        size = len(self.durable)
        for change in self.pending:
            size = change.size_after(size)
        return size

    def change(self, offset: int, data: memoryview | None) -> FileChange:
        """Begin a change."""
        change = FileChange(offset, data)
        self.pending.append(change)
        return change

    def drop(self, change: FileChange) -> None:
        """Forget a change that failed."""
        self.pending.remove(change)

    def settled(self) -> list[FileChange]:
        """The changes that a sync beginning now will cover: those whose calls have returned."""
        return [change for change in self.pending if change.complete]

    def sync(self, changes: Sequence[FileChange]) -> None:
        """Make changes last."""
        synced = set(map(id, changes))
        for change in self.pending:
            if id(change) in synced:
                _apply(self.durable, change)
        self.pending = [change for change in self.pending if id(change) not in synced]

    def now(self) -> bytes:
        """Bytes as a reader sees them."""
        image = bytearray(self.durable)
        for change in self.pending:
            _apply(image, change)
        return bytes(image)

    def crash(self, rng: np.random.Generator, sector: int) -> bytes | bytearray:
        """Bytes that a power loss may leave: each sector in any state it went through, any size the file had."""
        count = len(self.pending)
        if not count:
            return self.durable
        if rng.random() < 0.3:  # the kindest and the plainest: everything, nothing, or all up to a moment
            image = bytearray(self.durable)
            for change in self.pending[: rng.choice(np.asarray([0, count, rng.integers(count + 1)]))]:
                _apply(image, change)
            return image
        return self._torn(rng, sector)

    def _torn(self, rng: np.random.Generator, sector: int) -> bytearray:
        sizes = [len(self.durable)]
        for change in self.pending:
            sizes.append(change.size_after(sizes[-1]))
        image = bytearray(max(sizes))
        image[: sizes[0]] = self.durable
        writes = [_as_write(change, size) for change, size in zip(self.pending, sizes, strict=False)]
        limits = _limits(rng, writes, -(-len(image) // sector), sector)
        seen = np.zeros_like(limits)
        for offset, data in writes:
            touched = slice(offset // sector, -(-(offset + len(data)) // sector))
            for first, end in _runs(seen[touched] < limits[touched]):
                start = max(offset, (touched.start + first) * sector)
                stop = min(offset + len(data), (touched.start + end) * sector)
                image[start:stop] = data[start - offset : stop - offset]
            seen[touched] += 1
        size = sizes[-1] if rng.random() < 0.5 else int(rng.choice(sizes))
        return image[:size] + bytes(max(0, size - len(image)))


def _apply(image: bytearray, change: FileChange) -> None:
    """Change an image as the call changed the file."""
    size = change.size_after(len(image))
    if size > len(image):
        image.extend(bytes(size - len(image)))
    if change.data is None:
        del image[size:]
    else:
        image[change.offset : change.offset + len(change.data)] = change.data


def _as_write(change: FileChange, size: int) -> tuple[int, memoryview | bytes]:
    """A change of a file of ``size`` bytes as bytes at an offset: cutting a file zeroes what lay behind."""
    if change.data is not None:
        return change.offset, change.data
    return change.offset, bytes(max(0, size - change.offset))


def _limits(
    rng: np.random.Generator, writes: Sequence[tuple[int, memoryview | bytes]], sectors: int, sector: int
) -> npt.NDArray[np.int64]:
    """How many of the writes that touch each sector reached it; few, many or about half of them, as drawn."""
    counts = np.zeros(sectors, dtype=np.int64)
    for offset, data in writes:
        counts[offset // sector : -(-(offset + len(data)) // sector)] += 1
    kept = rng.random(sectors) ** float(rng.choice([0.1, 0.3, 1.0, 3.0, 10.0]))
    return np.floor(kept * (counts + 1)).astype(np.int64)


def _runs(wanted: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and end of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
