"""One sequence in one layer: sealed pages, their positions and sketches, and the raw tail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from kvtier.core.group import LayerGroup
from kvtier.core.growable import GrowingArray, GrowingSketch
from kvtier.core.growing import next_pages
from kvtier.core.policy import IntArray
from kvtier.core.tail import Tail
from kvtier.core.views import PageViews, SlabFrames, join_short_runs, split_columns
from kvtier.errors import SessionStateError

__all__ = ["LayerSequence", "Segment"]


class Segment(NamedTuple):
    """Slots ``start`` to ``stop`` with their K [1, Hk, n, Dk] and V [1, Hk, n, Dv].

    ``ahead`` tells how many positions its keys are rotated too far where positions are compact.
    """

    start: int
    stop: int
    keys: torch.Tensor
    values: torch.Tensor
    ahead: int = 0


@dataclass(slots=True)
class LayerSequence:
    """Slots of one sequence in one layer, in the order they were appended.

    Slot i of KV head h is in page ``pages[h, i // P]`` when sealed, else in the tail. Positions ascend over the slots
    of a head;
    heads agree on positions until a selection makes them differ.

    Attributes
    ----------
    last_position : int, optional
        Position of the newest slot; None when empty.
    evicted_length : int
        Slots that a selection left; 0 when nothing was ever dropped.
    follows_eviction : bool
        Whether it holds what came after an eviction, and grows like what one left.
    version : object
        Changes with the contents; forks share it, so that equal versions mean equal contents.
    chosen : Tensor, optional
        Page columns [1, Hk, n] that the last decode step read.
    memory : Tensor, optional
        What the policy remembers of its last merge [1, Hk, S].
    """

    group: LayerGroup
    pages: GrowingArray[np.int64]
    positions: GrowingArray[np.int64]
    sketch: GrowingSketch | None
    raw: Tail
    last_position: int | None = None
    evicted_length: int = 0
    follows_eviction: bool = False
    version: object = field(default_factory=object)
    chosen: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    _views: PageViews | None = None

    @classmethod
    def empty(cls, group: LayerGroup, *, sketched: bool) -> LayerSequence:
        """A sequence without tokens; its tail is allocated and counted."""
        return cls(
            group=group,
            pages=GrowingArray(group.heads, np.int64),
            positions=GrowingArray(1, np.int64),
            sketch=GrowingSketch(group.ledger) if sketched else None,
            raw=Tail(group, group.block_tokens),
        )

    @property
    def tail_length(self) -> int:
        """Slots in the tail."""
        return self.raw.length

    @property
    def sealed(self) -> int:
        """Slots in pages."""
        return self.pages.length * self.group.page_tokens

    @property
    def length(self) -> int:
        """Slots held."""
        return self.sealed + self.raw.length

    @property
    def croppable(self) -> int:
        """Slots that a crop may take: those since the last eviction."""
        return self.length - self.evicted_length

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Add tokens K [Hk, n, Dk], V [Hk, n, Dv], or the same as a batch of one; seal the blocks that became full.

        Their ``positions`` [1 or Hk, n] ascend, and come after ``last_position``.

        Raises
        ------
        CapacityError
            When no tier has room; tokens before the one that found none are kept.
        """
        added, done, store = keys.shape[-2], 0, self.group.store
        if not added:
            return
        if not store.bounded:
            store.tick()
            self._append_piece(keys, values, positions)
            return
        while done < added:
            store.tick()
            part = min(added - done, self._next_piece(added - done))
            piece = slice(done, done + part)
            self._append_piece(keys[..., piece, :], values[..., piece, :], positions[:, piece])
            done += part

    def append_token(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        """``append`` one token K [1, Hk, 1, Dk], V [1, Hk, 1, Dv], as a decode step does; most of them seal nothing."""
        if self.raw.length + 1 >= self.group.block_tokens:
            self.append(keys, values, np.array([[position]], dtype=np.int64))
            return
        self.group.store.tick()
        self.raw.extend(keys, values)
        self.positions.append_one(position)
        self.version, self.last_position = object(), position

    @property
    def loose_columns(self) -> int:
        """Page columns that cannot be attended where they lie and must be read into staging."""
        return self._page_views().loose.size

    def segments_in_place(self) -> list[Segment] | None:
        """All slots in order, as views; None when some pages must be read into staging."""
        views, arena = self._page_views(), self.group.arena
        paged: list[Segment] | None = arena.kept.get(views)
        if paged is None:
            if views.loose.size:
                return None
            paged = arena.kept[views] = list(self._runs(views))
        return [*paged, self.tail()] if self.raw.length else paged

    def slab_in_place(self) -> SlabFrames | None:
        """The slab that holds every page, when no page can ever leave it unnoticed; None when there is not just one."""
        views, arena = self._page_views(), self.group.arena
        if self.group.store.bounded:
            return None
        slabs: list[SlabFrames] | None = arena.kept.get((views, "slabs"))
        if slabs is None:
            slabs = arena.kept[views, "slabs"] = self._slabs(one_run=len(views.runs) == 1 and not views.loose.size)
        return slabs[0] if len(slabs) == 1 else None

    def _slabs(self, *, one_run: bool) -> list[SlabFrames]:
        held = self.group.store.frames(self.pages.view)
        slabs = []
        for slab in self.group.arena.slabs_of(held):
            frames = torch.from_numpy(held - slab.first).to(slab.keys.device)[None]
            slabs.append(SlabFrames(slab.keys, slab.values, frames, frames[:, :, :1].clone() if one_run else None))
        return slabs

    def tail(self) -> Segment:
        """The slots in the tail."""
        sealed = self.sealed
        return Segment(sealed, sealed + self.raw.length, *self.raw.batched())

    def segments(self, columns_at_once: int) -> Iterator[Segment]:
        """All slots: first those in runs, as views, then copies of the other pages, read ahead, then the tail."""
        store, page = self.group.store, self.group.page_tokens
        views, pages = self._page_views(), self.pages.view
        groups = split_columns(views.loose, columns_at_once)
        ahead = store.read_behind(pages[:, groups[0]].ravel()) if groups else None
        yield from self._runs(views)
        for index, columns in enumerate(groups):
            if ahead is None:
                raise SessionStateError("no read was started for the next pages")
            keys, values = ahead.result()
            following = groups[index + 1] if index + 1 < len(groups) else None
            ahead = None if following is None else store.read_behind(pages[:, following].ravel())
            start = int(columns[0]) * page
            yield Segment(start, start + columns.size * page, self._by_head(keys), self._by_head(values))
        if self.raw.length:
            yield self.tail()

    def _runs(self, views: PageViews) -> Iterator[Segment]:
        arena, heads, page = self.group.arena, self.group.heads, self.group.page_tokens
        for place in views.runs:
            yield Segment(place.start * page, place.stop * page, *arena.view(place, heads))

    def fork(self) -> LayerSequence:
        """A second sequence with the same slots: pages shared, tail copied."""
        self.group.store.table.retain(self.pages.view)
        return LayerSequence(
            group=self.group,
            pages=self.pages.fork(),
            positions=self.positions.fork(),
            sketch=None if self.sketch is None else self.sketch.fork(),
            raw=self.raw.fork(),
            last_position=self.last_position,
            evicted_length=self.evicted_length,
            follows_eviction=self.follows_eviction,
            version=self.version,
            chosen=self.chosen,
            memory=self.memory,
        )

    def check_crop(self, remove: int) -> None:
        """Raise ``SessionStateError`` when ``crop`` would reach into a prompt that was evicted."""
        if remove > self.croppable:
            raise SessionStateError(
                f"cannot remove {remove} tokens: only {self.croppable} came after the last "
                "eviction; start a new session for another prompt"
            )

    def crop(self, remove: int) -> None:
        """Forget the newest ``remove`` slots; ``check_crop`` says whether that is possible."""
        length = self.length - remove
        if not remove:
            return
        if length < self.sealed:
            self._reopen(length)
        else:
            self.raw.length = length - self.sealed
        self._truncate_positions(length)
        self.chosen = None

    def replace(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Hold only these slots from now on: K [Hk, n, Dk], V [Hk, n, Dv], positions [Hk, n]."""
        self.clear()
        self.append(keys, values, positions)
        self.evicted_length = self.length

    def release(self) -> None:
        """Let go of pages, sketches and tail; the sequence is empty and must not be used again."""
        self.clear()
        self.raw.release()

    def clear(self) -> None:
        """Hold nothing, as when new; the tail stays allocated."""
        self.group.store.release(self.pages.view.ravel())
        self.pages.release()
        self.positions.release()
        self.pages = GrowingArray(self.group.heads, np.int64)
        self.positions = GrowingArray(1, np.int64)
        if self.sketch is not None:
            self.sketch.release()
        self.raw.length, self._views, self.last_position = 0, None, None
        self.evicted_length, self.chosen, self.version = 0, None, object()

    def _next_piece(self, wanted: int) -> int:
        """Tokens to take at once: all, or what fills half of a bounded arena."""
        block = self.group.block_tokens
        most = max(block, self.group.piece_tokens() // block * block)
        return max(1, most - self.tail_length) if wanted + self.tail_length > most else wanted

    def _append_piece(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        block = self.group.block_tokens
        total = self.raw.length + keys.shape[-2]
        sealing = total // block * block
        if sealing:
            keys, values = keys.view(keys.shape[-3:]), values.view(values.shape[-3:])
            self._seal(keys, values, sealing)
            keys, values = keys[:, sealing - self.raw.length :], values[:, sealing - self.raw.length :]
            self.raw.length = 0
            if join_short_runs(self.group.store, self.pages.view, self._page_views()):
                self._views = None
        self.raw.extend(keys, values)
        self.positions.append(positions)
        self.version, self.last_position = object(), _newest(positions)

    def _truncate_positions(self, length: int) -> None:
        self.positions.truncate(length)
        self.version, self.last_position = object(), _newest(self.positions.view) if length else None

    def _seal(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """Make pages of the tail followed by new tokens, ``tokens`` in all."""
        group, (tail_keys, tail_values) = self.group, self.raw.view()
        pages = next_pages(group.store, tokens // group.page_tokens, self.pages.view, since=self._since)
        self.pages.append(pages)
        runs, rest = group.arena.runs(group.store.frames(pages))
        page = group.page_tokens
        pieces = [(run.start * page, run.stop * page, run.keys, run.values) for run in runs]
        scratch = [self._scratch(int(column)) for column in rest]
        pieces += [
            (column * page, (column + 1) * page, part_keys, part_values) for column, part_keys, part_values in scratch
        ]
        for start, stop, into_keys, into_values in pieces:
            _fill(into_keys, start, stop, tail_keys, keys)
            _fill(into_values, start, stop, tail_values, values)
            if self.sketch is not None and len(pieces) == 1:
                self._sketch(into_keys)
        for column, part_keys, part_values in scratch:
            group.arena.write(group.store.frames(pages[:, column]), part_keys, part_values)
        if self.sketch is not None and len(pieces) > 1:
            sealed_keys, _ = group.arena.read(group.store.frames(pages).ravel())
            self._sketch(sealed_keys.unflatten(0, pages.shape).flatten(1, 2))

    @property
    def _since(self) -> int | None:
        """Page columns sealed since the last eviction, after which whole blocks were; None when nothing was dropped."""
        if not (self.evicted_length or self.follows_eviction):
            return None
        group = self.group
        return self.pages.length - self.evicted_length // group.block_tokens * group.block_tokens // group.page_tokens

    def _scratch(self, column: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        layer = self.group.layer
        shape = (self.group.heads, self.group.page_tokens)
        like = self.raw.keys
        return column, like.new_empty(*shape, layer.key_dim), like.new_empty(*shape, layer.value_dim)

    def _sketch(self, keys: torch.Tensor) -> None:
        """Summarise sealed keys [Hk, n * P, Dk]."""
        policy = self.group.retrieval
        if policy is None or self.sketch is None:
            raise SessionStateError("sketches need a retrieval policy")
        made = policy.sketch(keys.unflatten(1, (-1, self.group.page_tokens)))
        self.sketch.append(made, self.group.expected_pages)

    def _page_views(self) -> PageViews:
        """Which columns are views, cached until a page moves or is added."""
        views = self._views
        if views is None or views.version != self.group.arena.version or views.pages != self.pages.length:
            views = self._views = PageViews.of(self.group.store, self.pages.view)
        return views

    def _by_head(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages [Hk * n, P, D], heads outermost, as [1, Hk, n * P, D]."""
        return pages.reshape(1, self.group.heads, -1, pages.shape[2])

    def _reopen(self, length: int) -> None:
        """Crop into sealed pages: the cut block's first slots return to the tail."""
        group = self.group
        block, page = group.block_tokens, group.page_tokens
        kept_pages = length // block * block // page
        rest = length - kept_pages * page
        pages = self.pages.view
        if rest:
            columns = pages[:, kept_pages : kept_pages + -(-rest // page)]
            keys, values = group.store.read(columns.ravel())
            self.raw.length = 0
            self.raw.extend(self._by_head(keys)[0, :, :rest], self._by_head(values)[0, :, :rest])
        group.store.release(pages[:, kept_pages:].ravel())
        self.pages.truncate(kept_pages)
        self._views = None
        if self.sketch is not None:
            self.sketch.truncate(kept_pages)
        self.raw.length = rest


def _newest(positions: IntArray) -> int:
    """The greatest of positions [1 or Hk, n] that ascend in each row."""
    return positions.item(-1) if positions.shape[0] == 1 else int(positions[:, -1].max())


def _fill(into: torch.Tensor, start: int, stop: int, tail: torch.Tensor, fresh: torch.Tensor) -> None:
    """Copy slots ``start`` to ``stop`` of (tail followed by fresh) into ``into`` [Hk, stop - start, D]."""
    kept = tail.shape[1]
    split = min(max(kept, start), stop)
    if start < split:
        into[:, : split - start] = tail[:, start:split]
    if split < stop:
        into[:, split - start :] = fresh[:, split - kept : stop - kept]
