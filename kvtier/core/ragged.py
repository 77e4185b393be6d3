"""One sequence in one layer whose KV heads keep different numbers of tokens: pages of their own, then common ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvtier.core.arena import SlabPart
from kvtier.core.group import LayerGroup
from kvtier.core.policy import IntArray
from kvtier.core.sequence import LayerSequence, Segment

__all__ = ["UNSEEN", "HeadPages", "RaggedFrames", "RaggedSequence"]

UNSEEN = np.iinfo(np.int64).max
"""Position of a slot that holds no token: no query sees it."""


class RaggedFrames(NamedTuple):
    """Frames K [F, P, Dk] and V [F, P, Dv] of a slab, those [1, Hk, N] of each KV head, and its tokens [1, Hk] there.

    A frame at or behind the length of its head means nothing. ``runs`` has views K [1, 1, n, Dk] and V [1, 1, n, Dv] of
    each head, where that is the quicker way to attend: on a CPU, when the frames of every head lie in a row. On a GPU
    one launch over all heads is.
    """

    keys: torch.Tensor
    values: torch.Tensor
    frames: torch.Tensor
    lengths: torch.Tensor
    runs: list[tuple[torch.Tensor, torch.Tensor]] | None


@dataclass(frozen=True, slots=True, eq=False)
class HeadPages:
    """What a selection left of each KV head; it never changes, and forks share it.

    Attributes
    ----------
    pages : array
        [Hk, N] int64; of head h the first ``ceil(counts[h] / P)`` are its own, the last of them perhaps not full.
    counts : array
        Tokens [Hk] of each head.
    positions : array
        [Hk, max(counts)] int64, ascending, ``UNSEEN`` behind the tokens of a head.
    """

    group: LayerGroup
    pages: IntArray
    counts: IntArray
    positions: IntArray

    @classmethod
    def none(cls, group: LayerGroup) -> HeadPages:
        """No tokens."""
        empty = np.empty((group.heads, 0), dtype=np.int64)
        return cls(group, empty, np.zeros(group.heads, dtype=np.int64), empty)

    @classmethod
    def write(
        cls, group: LayerGroup, counts: IntArray, keys: torch.Tensor, values: torch.Tensor, positions: IntArray
    ) -> HeadPages:
        """Put K [n, P, Dk] and V [n, P, Dv], the pages of one head after those of another, into new frames.

        Raises
        ------
        CapacityError
            When no tier has room; nothing is held then.
        """
        return cls.over(group, _stored(group, keys, values), counts, positions)

    @classmethod
    def over(cls, group: LayerGroup, flat: IntArray, counts: IntArray, positions: IntArray) -> HeadPages:
        """Hold the pages ``flat``, those of one head after those of another; they are the caller's to give."""
        columns = -(-counts // group.page_tokens)
        if not flat.size:
            return cls(group, np.empty((group.heads, 0), dtype=np.int64), counts, positions)
        first = np.cumsum(columns) - columns
        places = first[:, None] + np.minimum(np.arange(int(columns.max())), columns[:, None] - 1)
        return cls(group, flat[places], counts, positions)

    @property
    def tokens(self) -> int:
        """Tokens of the fullest head."""
        return self.positions.shape[1]

    @property
    def filled(self) -> IntArray:
        """Tokens [Hk, N] in each page of each head; 0 for those that are not its own."""
        page = self.group.page_tokens
        filled: IntArray = np.clip(self.counts[:, None] - np.arange(self.pages.shape[1]) * page, 0, page)
        return filled

    @property
    def ids(self) -> IntArray:
        """Every page once."""
        ids: IntArray = self.pages[self.filled > 0]
        return ids

    def in_place(self) -> list[RaggedFrames] | None:
        """The pages where they lie, slab by slab; None while some are not on the device."""
        arena, store = self.group.arena, self.group.store
        found: list[RaggedFrames] | None = arena.kept.get(self)
        if found is None and store.resident(self.pages).all():
            found = arena.kept[self] = self._slabs()
        return found

    def _slabs(self) -> list[RaggedFrames]:
        frames, filled = self.group.store.frames(self.pages), self.filled
        parts = []
        for slab in self.group.arena.slabs_of(frames):
            inside = filled > 0 if slab.inside is None else slab.inside & (filled > 0)
            left = np.argsort(~inside, axis=1, kind="stable")[:, : int(inside.sum(axis=1).max())]
            own = np.take_along_axis(np.where(inside, frames - slab.first, 0), left, axis=1)
            lengths = (filled * inside).sum(axis=1)
            index, tokens = (torch.from_numpy(part).to(slab.keys.device)[None] for part in (own, lengths))
            runs = _runs(slab, own, lengths) if slab.keys.device.type == "cpu" else None
            parts.append(RaggedFrames(slab.keys, slab.values, index, tokens, runs))
        return parts

    def segments(self, columns_at_once: int) -> Iterator[Segment]:
        """All slots as copies, from whichever tier; those that hold no token are zeros."""
        group, page, held = self.group, self.group.page_tokens, self.filled > 0
        for start in range(0, self.pages.shape[1], columns_at_once):
            part = slice(start, start + columns_at_once)
            keys, values = group.store.read(self.pages[:, part][held[:, part]])
            stop = min((start + held[:, part].shape[1]) * page, self.tokens)
            inside = torch.from_numpy(held[:, part].copy()).to(keys.device)
            k, v = (_spread(pages, inside)[:, :, : stop - start * page] for pages in (keys, values))
            yield Segment(start * page, stop, k, v)

    def retain(self) -> None:
        """One more sequence holds these pages."""
        self.group.store.table.retain(self.ids)

    def release(self) -> None:
        """One sequence fewer holds these pages."""
        self.group.store.release(self.ids)


@dataclass(slots=True)
class RaggedSequence:
    """What an eviction left, each KV head its own number of tokens, and what was appended since, the same for all.

    Slot i of a KV head is its i-th kept token below ``kept.tokens``, if it has so many, else a recent one.

    Attributes
    ----------
    kept : HeadPages
        What the eviction left.
    recent : LayerSequence
        Tokens that came after it.
    newest : int
        Position of the last token before the eviction.
    """

    group: LayerGroup
    kept: HeadPages
    recent: LayerSequence
    newest: int

    def __post_init__(self) -> None:
        self.recent.follows_eviction = True

    @classmethod
    def after(cls, sequence: LayerSequence) -> RaggedSequence:
        """A sequence over an emptied one, which takes what comes next; ``keep`` must follow."""
        newest = sequence.last_position
        sequence.clear()
        return cls(sequence.group, HeadPages.none(sequence.group), sequence, -1 if newest is None else newest)

    @property
    def length(self) -> int:
        """Slots of each KV head: as many as the fullest holds tokens."""
        return self.kept.tokens + self.recent.length

    @property
    def counts(self) -> IntArray:
        """Tokens [Hk] that each KV head holds."""
        counts: IntArray = self.kept.counts + self.recent.length
        return counts

    @property
    def positions(self) -> IntArray:
        """Positions [Hk, length], ``UNSEEN`` in slots that hold no token."""
        recent = self.recent.positions.view
        return np.concatenate(
            [self.kept.positions, np.broadcast_to(recent, (self.group.heads, recent.shape[1]))], axis=1
        )

    @property
    def page_columns(self) -> int:
        """Pages per KV head, on average and rounded up."""
        return -(-self.kept.ids.size // self.group.heads) + self.recent.pages.length

    @property
    def page_ids(self) -> IntArray:
        """Every page of every KV head."""
        return np.concatenate([self.kept.ids, self.recent.pages.view.ravel()])

    @property
    def last_position(self) -> int | None:
        """Position of the newest slot."""
        last = self.recent.last_position
        return self.newest if last is None else last

    @property
    def version(self) -> object:
        """Changes with the contents; forks share it."""
        return self.recent.version

    @property
    def croppable(self) -> int:
        """Slots that a crop may take: those since the eviction."""
        return self.recent.length

    @property
    def loose_columns(self) -> int:
        """Page columns that must be read into staging to be read as segments."""
        return self.kept.pages.shape[1] + self.recent.loose_columns

    def in_order(self) -> torch.Tensor:
        """The slots of each KV head in the order of their positions [Hk, length], those without a token first."""
        order = np.argsort(self.positions != UNSEEN, axis=1, kind="stable")
        return torch.from_numpy(order).to(self.group.device)

    def keep(self, counts: IntArray, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Hold only these tokens from now on; what they are is said by `HeadPages.write`.

        Raises
        ------
        CapacityError
            When no tier has room; nothing is held then.
        """
        self.newest = self.newest if self.recent.last_position is None else self.recent.last_position
        self.kept.release()
        self.kept = HeadPages.none(self.group)
        self.recent.clear()
        self.kept = HeadPages.write(self.group, counts, keys, values, positions)

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Add tokens to every KV head, as `LayerSequence.append` does."""
        self.recent.append(keys, values, positions)

    def segments(self, columns_at_once: int) -> Iterator[Segment]:
        """All slots in order; the kept ones as copies, zeros where a head has no token."""
        yield from self.kept.segments(columns_at_once)
        for segment in self.recent.segments(columns_at_once):
            yield segment._replace(start=segment.start + self.kept.tokens, stop=segment.stop + self.kept.tokens)

    def fork(self) -> RaggedSequence:
        """A second sequence with the same slots: pages shared, tail copied."""
        twin = RaggedSequence(self.group, self.kept, self.recent.fork(), self.newest)
        self.kept.retain()
        return twin

    def check_crop(self, remove: int) -> None:
        """Raise ``SessionStateError`` when a crop would reach into what was evicted."""
        self.recent.check_crop(remove)

    def crop(self, remove: int) -> None:
        """Forget the newest ``remove`` slots."""
        self.recent.crop(remove)

    def release(self) -> None:
        """Let go of pages and tail; the sequence must not be used again."""
        self.kept.release()
        self.kept = HeadPages.none(self.group)
        self.recent.release()


def _runs(slab: SlabPart, frames: IntArray, lengths: IntArray) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Views of the frames [Hk, N] of each KV head, as far as they hold ``lengths`` [Hk]; None when some lie apart."""
    page = slab.keys.shape[1]
    used = np.arange(1, frames.shape[1]) * page < lengths[:, None]
    if ((np.diff(frames, axis=1) != 1) & used).any():
        return None
    starts = (frames[:, 0] * page).tolist()
    keys, values = (pool.flatten(0, 1)[None, None] for pool in (slab.keys, slab.values))
    spans = [slice(start, start + length) for start, length in zip(starts, lengths.tolist(), strict=True)]
    return [(keys[:, :, span], values[:, :, span]) for span in spans]


def _stored(group: LayerGroup, keys: torch.Tensor, values: torch.Tensor) -> IntArray:
    """Ids of new pages with these contents; on a bounded device a part at a time, so that the first may leave it."""
    store, total = group.store, keys.shape[0]
    step = max(1, group.piece_tokens() // group.page_tokens * group.heads) if store.bounded else total
    ids = np.empty(0, dtype=np.int64)
    try:
        for start in range(0, total, step):
            part = slice(start, min(start + step, total))
            store.tick()
            new = store.new_pages(1, part.stop - part.start)[0]
            ids = np.concatenate([ids, new])
            group.arena.write(store.frames(new), keys[part], values[part])
    except BaseException:
        store.release(ids)
        raise
    return ids


def _spread(pages: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Pages [n, P, D] laid where ``inside`` [Hk, N] is true, as [1, Hk, N * P, D], zeros elsewhere."""
    laid = pages.new_zeros(*inside.shape, *pages.shape[1:])
    laid[inside] = pages
    return laid.flatten(1, 2)[None]
