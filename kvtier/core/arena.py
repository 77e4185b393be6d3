"""Page frames of one layer group on one device: slabs of memory, allocated in runs that attention reads as views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kvtier.core.ledger import Ledger
from kvtier.core.policy import IntArray
from kvtier.errors import CapacityError
from kvtier.kernels.pack_pages import pack_pages
from kvtier.storage_backends.memory import empty_huge
from kvtier.types import DTYPE_BYTES, LayerLayout

__all__ = ["Arena", "Place", "Run", "SlabPart"]

_PURPOSE = "pages"
_COPY_BYTES = 4 << 20


class Run(NamedTuple):
    """Columns ``start`` to ``stop`` of a page table whose frames are one strided view.

    ``keys`` [Hk, (stop - start) * P, Dk] and ``values`` share memory with the arena.
    """

    start: int
    stop: int
    keys: torch.Tensor
    values: torch.Tensor


class Place(NamedTuple):
    """Where a run lies, without holding its memory: ``first`` frame of the first head, ``stride`` frames a head."""

    start: int
    stop: int
    first: int
    stride: int


class SlabPart(NamedTuple):
    """A slab's frames K [F, P, Dk] and V [F, P, Dv], the id of its first, and which frames asked for it holds.

    ``inside`` is None when it holds all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: int
    inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None


@dataclass(slots=True)
class _Slab:
    first: int
    keys: torch.Tensor
    values: torch.Tensor
    free: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

    @property
    def frames(self) -> int:
        return self.free.size


class Arena:
    """Frames for pages: each holds K [P, Dk] and V [P, Dv] of one KV head.

    Frame ids are global over the slabs and never reused by another slab; ids of neighbouring slabs leave a gap, so that
    consecutive ids always are neighbours in memory.

    Notes
    -----
    Not locked. ``version`` changes whenever a frame is freed, so that what was found about frames can be told stale.

    Attributes
    ----------
    kept : dict
        Views that sequences want to use again; emptied whenever a frame is freed, so that none outlives its slab.
    """

    def __init__(self, layer: LayerLayout, page_tokens: int, device: torch.device, ledger: Ledger) -> None:
        self.layer = layer
        self.page_tokens = page_tokens
        self.device = device
        self.dtype: torch.dtype = getattr(torch, layer.dtype)
        self.frame_bytes = page_tokens * (layer.key_dim + layer.value_dim) * DTYPE_BYTES[layer.dtype]
        self.free_frames = 0
        self.total_frames = 0
        self.version = 0
        self._ledger = ledger
        self._slabs: list[_Slab] = []
        self._firsts = np.empty(0, dtype=np.int64)
        self._next_first = 0
        self.kept: dict[object, Any] = {}

    @property
    def slabs(self) -> int:
        """Slabs held."""
        return len(self._slabs)

    def grow(self, frames: int) -> None:
        """Add a slab.

        Raises
        ------
        CapacityError
            When the ledger refuses it; nothing was allocated.
        """
        self._ledger.take(_PURPOSE, frames * self.frame_bytes)
        keys, values = (
            empty_huge((frames, self.page_tokens, dim), self.dtype, self.device)
            for dim in (self.layer.key_dim, self.layer.value_dim)
        )
        self._slabs.append(_Slab(self._next_first, keys, values, np.ones(frames, dtype=np.bool_)))
        self._firsts = np.array([slab.first for slab in self._slabs], dtype=np.int64)
        self._next_first += frames + 1
        self.free_frames += frames
        self.total_frames += frames

    def drop(self, index: int) -> None:
        """Give back a slab whose frames are all free."""
        slab = self._slabs.pop(index)
        self._firsts = np.array([kept.first for kept in self._slabs], dtype=np.int64)
        self.free_frames -= slab.frames
        self.total_frames -= slab.frames
        self._changed()
        self._ledger.give(_PURPOSE, slab.frames * self.frame_bytes)

    def bounds(self, index: int) -> tuple[int, int]:
        """First frame id of a slab, and one past its last."""
        slab = self._slabs[index]
        return slab.first, slab.first + slab.frames

    def slab_bytes(self, index: int) -> int:
        """Bytes of a slab."""
        return self._slabs[index].frames * self.frame_bytes

    def empty_slabs(self) -> list[int]:
        """Indices of slabs without a used frame, last first, fit to be dropped in that order."""
        return [index for index in range(len(self._slabs) - 1, -1, -1) if self._slabs[index].free.all()]

    def allocate(self, heads: int, columns: int, *, spare: int = 0) -> IntArray:
        """Frame ids [heads, columns], in runs as long as free memory allows, one run a head, heads at equal distance.

        Behind each head's run up to ``spare`` columns stay free for ``extend``, as far as one free run has them; others
        may take them.

        Raises
        ------
        CapacityError
            When fewer frames are free; nothing was allocated.
        """
        if heads * columns > self.free_frames:
            raise CapacityError(f"{heads * columns} page frames were needed, {self.free_frames} are free")
        roomy = self.allocate_run(heads, columns, spare=spare) if spare else None
        if roomy is not None:
            return roomy
        frames: IntArray = np.empty((heads, columns), dtype=np.int64)
        done = 0
        while done < columns:
            first, taken = self._longest_run(heads, columns - done)
            if not taken:
                frames[:, done:] = self._scattered(heads * (columns - done)).reshape(columns - done, heads).T
                break
            frames[:, done : done + taken] = first + np.arange(heads)[:, None] * taken + np.arange(taken)
            self._take(frames[:, done : done + taken].ravel())
            done += taken
        return frames

    def allocate_run(self, heads: int, columns: int, *, spare: int) -> IntArray | None:
        """The same as one run with some of the ``spare`` columns behind every head; None where none is free."""
        roomy = self._roomy_run(heads, columns, spare)
        if roomy is None:
            return None
        first, width = roomy
        frames: IntArray = first + np.arange(heads)[:, None] * width + np.arange(columns)
        self._take(frames.ravel())
        return frames

    def extend(self, frames: IntArray, columns: int) -> IntArray | None:
        """Frame ids [heads, columns] right behind ``frames`` [heads], when all of them are free; None when not."""
        wanted: IntArray = frames[:, None] + np.arange(1, columns + 1)
        slab = self._slabs[int(self._slab_index(frames[:1])[0])]
        inside = wanted - slab.first
        if inside.min() < 0 or inside.max() >= slab.frames or not slab.free[inside].all():
            return None
        self._take(wanted.ravel())
        return wanted

    def claim(self, frames: IntArray) -> bool:
        """Take just these frame ids, of any shape; False, and none is taken, when one is taken or named twice."""
        flat = frames.ravel()
        free = all(slab.free[flat[inside] - slab.first].all() for slab, inside in self._by_slab(flat))
        if not free or np.unique(flat).size != flat.size:
            return False
        self._take(flat)
        return True

    def release(self, frames: IntArray) -> None:
        """Free these frame ids, of any shape."""
        flat = frames.ravel()
        for slab, inside in self._by_slab(flat):
            slab.free[flat[inside] - slab.first] = True
        self.free_frames += flat.size
        self._changed()

    def runs(self, frames: IntArray) -> tuple[list[Run], IntArray]:
        """Views over columns of ``frames`` [heads, columns] that lie in runs, and the columns that do not."""
        found, rest = self.places(frames)
        views = [(place, *self.view(place, frames.shape[0])) for place in found]
        return [Run(place.start, place.stop, keys[0], values[0]) for place, keys, values in views], rest

    def places(self, frames: IntArray) -> tuple[list[Place], IntArray]:
        """The same, as places: what a sequence may keep, where a view would keep a dropped slab alive."""
        heads, columns = frames.shape
        if not columns:
            return [], np.empty(0, dtype=np.int64)
        steps = np.diff(frames, axis=0)
        stride = steps[0] if heads > 1 else np.ones(columns, dtype=np.int64)
        regular = (stride > 0) & (self._slab_index(frames[0]) == self._slab_index(frames[-1]))
        if heads > 1:
            regular &= (steps == stride).all(axis=0)
        joined = regular[1:] & regular[:-1] & (np.diff(frames, axis=1) == 1).all(axis=0)
        edges = np.concatenate([[0], np.flatnonzero(~joined) + 1, [columns]])
        spans = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        found = [
            Place(start, stop, int(frames[0, start]), int(stride[start])) for start, stop in spans if regular[start]
        ]
        return found, np.flatnonzero(~regular)

    def view(self, place: Place, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The run at a place, K [1, heads, n * P, Dk] and V [1, heads, n * P, Dv]; its frames must not have moved."""
        slab = self._slabs[int(np.searchsorted(self._firsts, place.first, side="right")) - 1]
        offset, tokens = place.first - slab.first, (place.stop - place.start) * self.page_tokens

        def over(pool: torch.Tensor) -> torch.Tensor:
            page = pool.stride(0)
            shape, strides = (1, heads, tokens, pool.shape[2]), (0, place.stride * page, pool.shape[2], 1)
            return pool.as_strided(shape, strides, offset * page)

        return over(slab.keys), over(slab.values)

    def slabs_of(self, frames: IntArray) -> list[SlabPart]:
        """The slabs that hold some of ``frames``, of any shape."""
        if len(self._slabs) == 1:
            slab = self._slabs[0]
            return [SlabPart(slab.keys, slab.values, slab.first, None)]
        index = self._slab_index(frames)
        parts = []
        for place in np.unique(index).tolist():
            slab, inside = self._slabs[place], index == place
            parts.append(SlabPart(slab.keys, slab.values, slab.first, None if inside.all() else inside))
        return parts

    def read(self, frames: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of frames [n]: K [n, P, Dk] and V [n, P, Dv]."""
        keys = torch.empty(frames.size, self.page_tokens, self.layer.key_dim, dtype=self.dtype, device=self.device)
        values = torch.empty(frames.size, self.page_tokens, self.layer.value_dim, dtype=self.dtype, device=self.device)
        for slab, inside in self._by_slab(frames):
            index = torch.from_numpy(frames[inside] - slab.first).to(self.device)
            target = torch.from_numpy(inside).to(self.device)
            keys.index_copy_(0, target, slab.keys.index_select(0, index))
            values.index_copy_(0, target, slab.values.index_select(0, index))
        return keys, values

    def pack(self, frames: IntArray) -> torch.Tensor:
        """Copies of frames [n] as rows [n, P * (Dk + Dv)]: of each K, then V."""
        width = self.page_tokens * (self.layer.key_dim + self.layer.value_dim)
        rows = torch.empty(frames.size, width, dtype=self.dtype, device=self.device)
        for slab, inside in self._by_slab(frames):
            index = torch.from_numpy(frames[inside] - slab.first)
            if inside.size == frames.size:
                return pack_pages(slab.keys, slab.values, index, into=rows)
            rows.index_copy_(0, torch.from_numpy(inside).to(self.device), pack_pages(slab.keys, slab.values, index))
        return rows

    def write(self, frames: IntArray, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill frames [n] with K [n, P, Dk] and V [n, P, Dv]."""
        for slab, inside in self._by_slab(frames):
            index = torch.from_numpy(frames[inside] - slab.first).to(self.device)
            source = torch.from_numpy(inside).to(self.device)
            slab.keys.index_copy_(0, index, keys.index_select(0, source))
            slab.values.index_copy_(0, index, values.index_select(0, source))

    def may_grow(self, frames: int) -> bool:
        """Whether the ledger has room for a slab of this size."""
        return self._ledger.fits(frames * self.frame_bytes)

    def held_by_purpose(self) -> str:
        """What the device budget went to, for messages."""
        return self._ledger.describe()

    def repack(self, frames: IntArray) -> IntArray:
        """Move all used frames [n] to one new slab of just their size, in their order; returns their new ids."""
        order = np.argsort(frames, kind="stable")
        held = len(self._slabs)
        self.grow(frames.size)
        moved = np.empty_like(frames)
        moved[order] = self._slabs[-1].first + np.arange(frames.size)
        self._take(moved)
        step = max(1, _COPY_BYTES // self.frame_bytes)
        for start in range(0, frames.size, step):
            part = order[start : start + step]
            self.write(moved[part], *self.read(frames[part]))
        self.release(frames)
        for index in range(held - 1, -1, -1):
            self.drop(index)
        return moved

    def _changed(self) -> None:
        self.version += 1
        self.kept.clear()

    def _longest_run(self, heads: int, columns: int, slabs: Sequence[_Slab] | None = None) -> tuple[int, int]:
        """First frame and length in columns of the first free run that fits, else of the longest; length 0 if none."""
        best_first, best = 0, 0
        for slab in self._slabs if slabs is None else slabs:
            free = np.flatnonzero(slab.free)
            if free.size < heads:
                continue
            cuts = np.flatnonzero(np.diff(free) != 1)
            starts = free[np.concatenate([[0], cuts + 1])]
            lengths = (free[np.concatenate([cuts, [free.size - 1]])] - starts + 1) // heads
            fitting = np.flatnonzero(lengths >= columns)
            if fitting.size:
                return slab.first + int(starts[fitting[0]]), columns
            longest = int(lengths.argmax())
            if lengths[longest] > best:
                best_first, best = slab.first + int(starts[longest]), int(lengths[longest])
        return best_first, best

    def _roomy_run(self, heads: int, columns: int, spare: int) -> tuple[int, int] | None:
        """First frame, and frames a head, of a run with up to ``spare`` columns more; None when none has any more.

        What lies before it keeps as many frames to grow into. Of two as roomy the newer slab's: older ones may empty.
        """
        best: tuple[int, int] | None = None
        for slab in reversed(self._slabs):
            first, taken = self._longest_run(1, heads * (columns + spare) + spare, (slab,))
            before = 0 if first == slab.first else spare
            width = min(columns + spare, (taken - before) // heads)
            if width > (columns if best is None else best[1]):
                best = first + before, width
        return best

    def _scattered(self, count: int) -> IntArray:
        free = np.concatenate([np.flatnonzero(slab.free) + slab.first for slab in self._slabs])[:count]
        self._take(free)
        return free

    def _take(self, frames: IntArray) -> None:
        for slab, inside in self._by_slab(frames):
            slab.free[frames[inside] - slab.first] = False
        self.free_frames -= frames.size

    def _slab_index(self, frames: IntArray) -> IntArray:
        return np.searchsorted(self._firsts, frames, side="right") - 1

    def _by_slab(self, frames: IntArray) -> list[tuple[_Slab, IntArray]]:
        if len(self._slabs) == 1:
            return [(self._slabs[0], np.arange(frames.size))]
        index = self._slab_index(frames)
        parts = ((slab, np.flatnonzero(index == place)) for place, slab in enumerate(self._slabs))
        return [(slab, inside) for slab, inside in parts if inside.size]
