"""The trail of a cache in the store: each chunk that fills up is read out while the forward runs, and published."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from kvtier.core.chunks import KVChunk
from kvtier.core.store_stats import PutReport
from kvtier.errors import KVTierError
from kvtier.integrations.hf.columns import Columns
from kvtier.integrations.hf.history import History

if TYPE_CHECKING:
    from kvtier.core.namespace import Namespace
    from kvtier.core.session import Session

__all__ = ["Trail"]

_PER_DECODE_STEP = 2
"""Most chunks of a row that one decode step reads out: it must not wait for a backlog."""


@dataclass(slots=True)
class _Due:
    """Chunks from ``first`` on that the running forward completes, of a row and of those equal to it."""

    rows: list[int]
    first: int
    ids: torch.Tensor
    chunks: list[KVChunk]


class Trail:
    """What of one cache is published, chunk by chunk, while its forwards run.

    Chunks are read between append and attention, layer by layer: before a policy evicts, and before a window slides.

    Parameters
    ----------
    space : Namespace
        Where they go.
    stored : sequence of int
        Leading chunks of each row that the store has.
    until : int, optional
        Columns after which nothing is published any more; None when all is.
    why : str
        The reason for that.

    Attributes
    ----------
    stopped : str
        Why nothing more is published; empty while something may be.
    published, refused, waiting : int
        Chunks that the store took, that it did not, and that are on their way.
    backlog : int
        Full chunks that were not handed over yet, for want of room in the store's queue.

    Notes
    -----
    Used by the thread that runs the model; the counts change in the store's thread. Nothing in here raises.
    """

    def __init__(self, space: Namespace, stored: Sequence[int], *, until: int | None = None, why: str = "") -> None:
        self.space = space
        self.stopped = ""
        self.running = False
        self.published = self.refused = self.waiting = self.backlog = 0
        self._lock = threading.Lock()
        self._done = list(stored)
        self._until, self._why = until, why
        self._due: list[_Due] = []
        self._quiet = 0  # columns that may come before any row fills its open chunk

    @property
    def chunk_tokens(self) -> int:
        """Tokens C of a chunk."""
        return self.space.layout.chunk_tokens

    def stop(self, reason: str) -> None:
        """Publish nothing more of this cache; the first reason holds."""
        self.stopped = self.stopped or reason
        self._due = []

    def open(self, history: History, columns: Columns, ids: torch.Tensor | None) -> None:
        """A forward over these columns begins: find out which chunks it completes."""
        self._due = []
        width = columns.positions.shape[1]
        if self.stopped:
            return
        if not self.running:
            self.stop("the cache was fed outside of generate()")
        elif self._until is not None and history.length >= self._until:
            self.stop(self._why)
        elif width <= self._quiet:
            self._quiet -= width
        elif columns.positions.shape[0] != len(self._done):
            self.stop(f"{len(self._done)} rows were expected, {columns.positions.shape[0]} ran")
        elif ids is None:
            self.stop("tokens came as embeddings")
        else:
            try:
                self._find_due(history, columns, ids)
            except (KVTierError, MemoryError, RuntimeError) as error:
                self.stop(f"no memory to read chunks into: {error}")

    def collect(self, session: Session, layer: int) -> None:
        """Read the due chunks of a layer, which holds the forward's tokens and has not attended yet."""
        for due in self._due:
            for place, chunk in enumerate(due.chunks):
                start = (due.first + place) * self.chunk_tokens
                tokens = slice(start, start + self.chunk_tokens)
                try:
                    here = session.read(layer, due.rows[0], tokens, chunk.k[layer], chunk.v[layer])
                except (KVTierError, MemoryError, RuntimeError) as error:
                    self.stop(f"a chunk could not be read: {error}")
                    return
                if not here:
                    self.stop("tokens of an open chunk are no longer held")
                    return

    def close(self) -> None:
        """The forward is through: hand over what it completed."""
        due_chunks, self._due = self._due, []
        for due in due_chunks:
            try:
                future = self.space.publish(due.ids, due.chunks, first_chunk=due.first)
            except (KVTierError, MemoryError, RuntimeError) as error:
                self._count(PutReport(refused=len(due.chunks), reason=str(error)))
                return
            count = len(due.chunks)
            with self._lock:
                self.waiting += count
            future.add_done_callback(partial(self._land, count))
            for row in due.rows:
                self._done[row] = due.first + count

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        if not self.stopped:
            self._done = [self._done[row] for row in rows]

    def crop(self, history: History) -> None:
        """Only the columns of this history are left."""
        if not self.stopped:
            counts = history.real.sum(dim=1).tolist()
            full = [count // self.chunk_tokens for count in counts]
            self._done = [min(done, most) for done, most in zip(self._done, full, strict=True)]
            self._quiet = 0
            # What a lossy policy generates may now come before the column where its prompt ended.
            self._until = None if self._until is None else min(self._until, history.length)

    def fork(self) -> Trail:
        """The trail of a cache that grows apart."""
        twin = Trail(self.space, self._done, until=self._until, why=self._why)
        twin.stopped = self.stopped
        return twin

    def _land(self, count: int, done: Future[PutReport]) -> None:
        """Chunks that were on their way have arrived, or not."""
        error = done.exception()
        with self._lock:
            self.waiting -= count
        self._count(done.result() if error is None else PutReport(refused=count, reason=str(error)))

    def _count(self, report: PutReport) -> None:
        with self._lock:
            self.published += report.stored + report.existing
            self.refused += report.refused
        if report.refused:
            # What follows could not be found without the chunk that is missing.
            self.stop(f"the store refused a chunk: {report.reason}")

    def _room(self) -> int:
        """Chunks that the store's queue has room for."""
        publisher = self.space.store.publisher
        return max(0, publisher.capacity_bytes - publisher.queued_bytes) // self.space.codec.payload_bytes

    def _find_due(self, history: History, columns: Columns, ids: torch.Tensor) -> None:
        """Note the chunks that these columns complete, equal ones of several rows once, and make room for them."""
        real = torch.ones_like(columns.positions, dtype=torch.bool) if columns.real is None else columns.real
        real = torch.cat([history.real, real], dim=1) if history.rows else real
        counts = real.sum(dim=1).tolist()
        if (before := history.ids) is None:
            self.stop("tokens came as embeddings")
            return
        first_forward = not history.rows
        all_ids = ids if first_forward else torch.cat([before, ids], dim=1)
        positions = columns.positions if first_forward else torch.cat([history.positions, columns.positions], dim=1)
        room, self.backlog = self._room(), 0
        most = _PER_DECODE_STEP if columns.positions.shape[1] == 1 else room
        found: list[_Due] = []
        for row, count in enumerate(counts):
            first, last = self._done[row], count // self.chunk_tokens
            if first >= last:
                continue
            tokens = all_ids[row][real[row]][: last * self.chunk_tokens]
            if not torch.equal(positions[row][real[row]][: tokens.numel()], torch.arange(tokens.numel())):
                self.stop("positions do not count the tokens of a row from 0")
                return
            twin = next((due for due in found if due.first == first and torch.equal(due.ids, tokens)), None)
            if twin is not None:
                twin.rows.append(row)
                continue
            taken = min(last - first, room, most)
            room -= taken
            self.backlog += last - first - taken
            if taken:
                empty = [self.space.codec.empty(range(len(self.space.layout.layers))) for _ in range(taken)]
                found.append(_Due([row], first, tokens, empty))
        self._due = found
        fullest = max(count % self.chunk_tokens for count in counts)
        self._quiet = 0 if found else self.chunk_tokens - 1 - fullest
