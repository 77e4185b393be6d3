"""One sequence in one layer: sealed pages, their positions and sketches, and the raw tail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from kvtier.core.arena import Run
from kvtier.core.group import LayerGroup
from kvtier.core.growable import GrowingArray, GrowingSketch
from kvtier.core.policy import IntArray
from kvtier.errors import InputError, SessionStateError

__all__ = ["LayerSequence", "Segment"]

_SHORT_RUN = 4


class Segment(NamedTuple):
    """Slots ``start`` to ``stop`` with their K [1, Hk, n, Dk] and V [1, Hk, n, Dv]."""

    start: int
    stop: int
    keys: torch.Tensor
    values: torch.Tensor


class _Layout(NamedTuple):
    """Which columns are views, and which must be read into staging; valid for one version of the arena."""

    version: int
    pages: int
    runs: list[Run]
    rest: IntArray


@dataclass(slots=True)
class LayerSequence:
    """Slots of one sequence in one layer, in the order they were appended.

    Slot i of KV head h is in page ``pages[h, i // P]`` when sealed, else in the tail. Positions ascend over the slots
    of a head;
    heads agree on positions until a selection makes them differ.

    Attributes
    ----------
    evicted_length : int
        Slots that a selection left; 0 when nothing was ever dropped.
    version : object
        Changes with the contents; forks share it, so that equal versions mean equal contents.
    """

    group: LayerGroup
    pages: GrowingArray[np.int64]
    positions: GrowingArray[np.int64]
    sketch: GrowingSketch | None
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    tail_length: int = 0
    evicted_length: int = 0
    version: object = field(default_factory=object)
    draft_start: int | None = None
    chosen: IntArray | None = None
    _layout: _Layout | None = None

    @classmethod
    def empty(cls, group: LayerGroup, *, sketched: bool) -> LayerSequence:
        """A sequence without tokens; its tail is allocated and counted."""
        keys, values = group.new_tail(group.block_tokens)
        return cls(
            group=group,
            pages=GrowingArray(group.heads, np.int64),
            positions=GrowingArray(1, np.int64),
            sketch=GrowingSketch(group.ledger) if sketched else None,
            tail_keys=keys,
            tail_values=values,
        )

    @property
    def sealed(self) -> int:
        """Slots in pages."""
        return self.pages.length * self.group.page_tokens

    @property
    def length(self) -> int:
        """Slots held."""
        return self.sealed + self.tail_length

    @property
    def croppable(self) -> int:
        """Slots that a crop may take: those since the last eviction."""
        return self.length - self.evicted_length

    @property
    def last_position(self) -> int | None:
        """Position of the newest slot; None when empty."""
        return int(self.positions.view[:, -1].max()) if self.length else None

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Add tokens K [Hk, n, Dk], V [Hk, n, Dv] at ``positions`` [1 or Hk, n]; seal the blocks that became full.

        Raises
        ------
        InputError
            When positions do not ascend.
        CapacityError
            When no tier has room; tokens before the one that found none are kept.
        """
        added = keys.shape[1]
        if not added:
            return
        self._check_order(positions)
        done = 0
        while done < added:
            self.group.store.tick()
            if self.draft_start is not None:
                self._widen_tail(self.tail_length + added)
            part = min(added - done, self._next_piece(added - done))
            piece = slice(done, done + part)
            self._append_piece(keys[:, piece], values[:, piece])
            self.positions.append(positions[:, piece])
            self.version = object()
            done += part

    @property
    def loose_columns(self) -> int:
        """Page columns that cannot be attended where they lie and must be read into staging."""
        return self._layout_now().rest.size

    def segments(self, columns_at_once: int) -> Iterator[Segment]:
        """All slots in order of pages then tail: views where pages lie in runs, copies read ahead elsewhere."""
        store, page = self.group.store, self.group.page_tokens
        layout = self._layout_now()
        pages = self.pages.view
        groups = _split(layout.rest, columns_at_once)
        ahead = store.read_behind(pages[:, groups[0]].ravel()) if groups else None
        for run in layout.runs:
            yield Segment(run.start * page, run.stop * page, run.keys[None], run.values[None])
        for index, columns in enumerate(groups):
            if ahead is None:
                raise SessionStateError("no read was started for the next pages")
            keys, values = ahead.result()
            following = groups[index + 1] if index + 1 < len(groups) else None
            ahead = None if following is None else store.read_behind(pages[:, following].ravel())
            start = int(columns[0]) * page
            yield Segment(start, start + columns.size * page, self._by_head(keys), self._by_head(values))
        if self.tail_length:
            yield Segment(self.sealed, self.length, *self.tail())

    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the tail: K [1, Hk, n, Dk] and V [1, Hk, n, Dv]."""
        return self.tail_keys[None, :, : self.tail_length], self.tail_values[None, :, : self.tail_length]

    def fork(self) -> LayerSequence:
        """A second sequence with the same slots: pages shared, tail copied."""
        keys, values = self.group.new_tail(self.tail_keys.shape[1])
        keys[:, : self.tail_length] = self.tail_keys[:, : self.tail_length]
        values[:, : self.tail_length] = self.tail_values[:, : self.tail_length]
        self.group.store.table.retain(self.pages.view)
        return LayerSequence(
            group=self.group,
            pages=self.pages.fork(),
            positions=self.positions.fork(),
            sketch=None if self.sketch is None else self.sketch.fork(),
            tail_keys=keys,
            tail_values=values,
            tail_length=self.tail_length,
            evicted_length=self.evicted_length,
            version=self.version,
            draft_start=self.draft_start,
            chosen=self.chosen,
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
            self.tail_length = length - self.sealed
        self.positions.truncate(length)
        self.version, self.chosen = object(), None

    def begin_draft(self) -> None:
        """What is appended from now on stays in the tail until ``accept``."""
        self.draft_start = self.length

    def accept(self, path: IntArray) -> None:
        """Keep the drafted slots at ``path``, counted from the draft's start; forget the others."""
        if self.draft_start is None:
            raise SessionStateError("accept() needs begin_draft() before the appends it judges")
        offset = self.draft_start - self.sealed
        index = torch.from_numpy(path + offset).to(self.tail_keys.device)
        kept_keys, kept_values = self.tail_keys[:, index], self.tail_values[:, index]
        kept_positions = self.positions.view[:, self.draft_start + path].copy()
        self.tail_length = offset
        self.positions.truncate(self.draft_start)
        self.version, self.draft_start = object(), None
        if path.size:
            self.append(kept_keys, kept_values, kept_positions)
        self._narrow_tail()

    def replace(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Hold only these slots from now on: K [Hk, n, Dk], V [Hk, n, Dv], positions [Hk, n]."""
        self._empty_pages()
        self.append(keys, values, positions)
        self.evicted_length, self.chosen = self.length, None

    def release(self) -> None:
        """Let go of pages, sketches and tail; the sequence is empty and must not be used again."""
        self._empty_pages()
        self.group.give_tail(self.tail_keys.shape[1])
        self.tail_keys, self.tail_values = self.tail_keys[:, :0], self.tail_values[:, :0]

    def _empty_pages(self) -> None:
        self.group.store.release(self.pages.view.ravel())
        self.pages.release()
        self.positions.release()
        self.pages = GrowingArray(self.group.heads, np.int64)
        self.positions = GrowingArray(1, np.int64)
        if self.sketch is not None:
            self.sketch.release()
        self.tail_length, self._layout = 0, None

    def _check_order(self, positions: IntArray) -> None:
        last = self.last_position
        ascending = positions.shape[1] < 2 or bool((np.diff(positions, axis=1) > 0).all())
        if not ascending or (last is not None and int(positions[:, 0].min()) <= last):
            raise InputError(
                f"positions must ascend within a sequence, got {positions[0, :4].tolist()}... after {last}; "
                "packed sequences and repeated positions are not served"
            )

    def _next_piece(self, wanted: int) -> int:
        """Tokens to take at once: all, or what fills half of a bounded arena."""
        if self.draft_start is not None or not self.group.store.bounded:
            return wanted
        block = self.group.block_tokens
        most = max(block, self.group.piece_tokens() // block * block)
        return max(1, most - self.tail_length) if wanted + self.tail_length > most else wanted

    def _append_piece(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        block = self.group.block_tokens
        total = self.tail_length + keys.shape[1]
        sealing = 0 if self.draft_start is not None else total // block * block
        if sealing:
            self._seal(keys, values, sealing)
            keys, values = keys[:, sealing - self.tail_length :], values[:, sealing - self.tail_length :]
            self.tail_length = 0
        end = self.tail_length + keys.shape[1]
        self.tail_keys[:, self.tail_length : end] = keys
        self.tail_values[:, self.tail_length : end] = values
        self.tail_length = end

    def _seal(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """Make pages of the tail followed by new tokens, ``tokens`` in all."""
        group, kept = self.group, self.tail_length
        pages = group.store.new_pages(group.heads, tokens // group.page_tokens)
        runs, rest = group.arena.runs(group.store.frames(pages))
        page = group.page_tokens
        pieces = [(run.start * page, run.stop * page, run.keys, run.values) for run in runs]
        scratch = [self._scratch(int(column)) for column in rest]
        pieces += [
            (column * page, (column + 1) * page, part_keys, part_values) for column, part_keys, part_values in scratch
        ]
        for start, stop, into_keys, into_values in pieces:
            _fill(into_keys, start, stop, self.tail_keys[:, :kept], keys)
            _fill(into_values, start, stop, self.tail_values[:, :kept], values)
            if self.sketch is not None and len(pieces) == 1:
                self._sketch(into_keys)
        for column, part_keys, part_values in scratch:
            group.arena.write(group.store.frames(pages[:, column]), part_keys, part_values)
        if self.sketch is not None and len(pieces) > 1:
            sealed_keys, _ = group.arena.read(group.store.frames(pages).ravel())
            self._sketch(sealed_keys.unflatten(0, pages.shape).flatten(1, 2))
        self.pages.append(pages)

    def _scratch(self, column: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        layer = self.group.layer
        shape = (self.group.heads, self.group.page_tokens)
        like = self.tail_keys
        return column, like.new_empty(*shape, layer.key_dim), like.new_empty(*shape, layer.value_dim)

    def _sketch(self, keys: torch.Tensor) -> None:
        """Summarise sealed keys [Hk, n * P, Dk]."""
        policy = self.group.retrieval
        if policy is None or self.sketch is None:
            raise SessionStateError("sketches need a retrieval policy")
        made = policy.sketch(keys.unflatten(1, (-1, self.group.page_tokens)))
        self.sketch.append(made, self.group.expected_pages)

    def _layout_now(self) -> _Layout:
        """Columns that are views, cached until a page moves or is added."""
        store = self.group.store
        held = self._layout
        if held is not None and held.version == store.arena.version and held.pages == self.pages.length:
            return held
        pages = self.pages.view
        here = store.resident(pages).all(axis=0)
        columns = np.flatnonzero(here)
        runs: list[Run] = []
        loose: list[IntArray] = [np.flatnonzero(~here)]
        for first, last in _stretches(columns):
            found, irregular = store.arena.runs(store.frames(pages[:, first:last]))
            runs += [run._replace(start=run.start + first, stop=run.stop + first) for run in found]
            loose.append(irregular + first)
        short = [run for run in runs if run.stop - run.start < _SHORT_RUN]
        if len(short) > 1:
            loose += [np.arange(run.start, run.stop) for run in short]
            runs = [run for run in runs if run.stop - run.start >= _SHORT_RUN]
        self._layout = _Layout(store.arena.version, self.pages.length, runs, np.sort(np.concatenate(loose)))
        return self._layout

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
            self.tail_keys[:, :rest] = self._by_head(keys)[0, :, :rest]
            self.tail_values[:, :rest] = self._by_head(values)[0, :, :rest]
        group.store.release(pages[:, kept_pages:].ravel())
        self.pages.truncate(kept_pages)
        self._layout = None
        if self.sketch is not None:
            self.sketch.truncate(kept_pages)
        self.tail_length = rest

    def _widen_tail(self, tokens: int) -> None:
        held = self.tail_keys.shape[1]
        if tokens <= held:
            return
        keys, values = self.group.new_tail(max(tokens, 2 * held))
        keys[:, : self.tail_length] = self.tail_keys[:, : self.tail_length]
        values[:, : self.tail_length] = self.tail_values[:, : self.tail_length]
        self.tail_keys, self.tail_values = keys, values
        self.group.give_tail(held)

    def _narrow_tail(self) -> None:
        held = self.tail_keys.shape[1]
        if held == self.group.block_tokens or self.draft_start is not None:
            return
        keys, values = self.group.new_tail(self.group.block_tokens)
        keys[:, : self.tail_length] = self.tail_keys[:, : self.tail_length]
        values[:, : self.tail_length] = self.tail_values[:, : self.tail_length]
        self.tail_keys, self.tail_values = keys, values
        self.group.give_tail(held)


def _fill(into: torch.Tensor, start: int, stop: int, tail: torch.Tensor, fresh: torch.Tensor) -> None:
    """Copy slots ``start`` to ``stop`` of (tail followed by fresh) into ``into`` [Hk, stop - start, D]."""
    kept = tail.shape[1]
    split = min(max(kept, start), stop)
    if start < split:
        into[:, : split - start] = tail[:, start:split]
    if split < stop:
        into[:, split - start :] = fresh[:, split - kept : stop - kept]


def _stretches(columns: IntArray) -> list[tuple[int, int]]:
    """Ranges of consecutive column numbers."""
    if not columns.size:
        return []
    cuts = np.flatnonzero(np.diff(columns) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(columns, cuts)]


def _split(columns: IntArray, most: int) -> list[IntArray]:
    """Consecutive columns in groups of at most ``most``."""
    return [
        np.arange(start, min(start + most, last))
        for first, last in _stretches(columns)
        for start in range(first, last, most)
    ]
