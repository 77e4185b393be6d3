"""A stored prefix that was found: leased, and loaded chunk by chunk with every byte verified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import repeat, takewhile
from typing import TYPE_CHECKING, Self

import torch

from kvtier.core.chunks import DecodingStep, KVChunk
from kvtier.core.load_worth import LoadDecision
from kvtier.errors import CapacityError, InputError
from kvtier.storage_backends.records import ByteRange, Lease, ReadRequest, RecordView

if TYPE_CHECKING:
    from types import TracebackType

    from kvtier.core.namespace import Namespace

__all__ = ["Hit"]


class Hit:
    """The longest stored prefix of some tokens.

    Attributes
    ----------
    tokens : int
        Tokens to load: those stored, or fewer where computing them again is predicted to be faster.
    stored_tokens : int
        Tokens that were stored when the prefix was matched.
    decision : LoadDecision, optional
        Both predictions, when `Namespace.match` was told how fast the model computes.

    Notes
    -----
    The chunks are not evicted before `release`, the end of a ``with`` block, or the lease's deadline. One thread at a
    time uses a hit.
    """

    def __init__(self, space: Namespace, keys: Sequence[bytes], lease: Lease, decision: LoadDecision | None) -> None:
        chunk_tokens = space.layout.chunk_tokens
        self.stored_tokens = len(keys) * chunk_tokens
        self.tokens = self.stored_tokens if decision is None else decision.tokens
        self.decision = decision
        self.lease = lease
        self._space = space
        self._keys = tuple(keys[: self.tokens // chunk_tokens])

    def load(
        self, layers: Sequence[int] | None = None, into: Sequence[KVChunk] | None = None, *, first_chunk: int = 0
    ) -> list[KVChunk]:
        """The chunks from ``first_chunk`` on, up to the first that proved damaged or gone.

        Parameters
        ----------
        layers : sequence of int, optional
            Layers to load, ascending; all by default. ``chunk.k[i]`` is the i-th of them. Other layers are not read.
        into : sequence of KVChunk, optional
            Where to put them, one for each chunk from ``first_chunk`` on (more are left alone): tensors of the layers
            on any device, views of larger ones too. By default new tensors on the CPU.
        first_chunk : int
            Chunks to leave out at the start, as for layers that only see a window.

        Returns
        -------
        list of KVChunk
            Verified; chunks of ``into`` beyond the returned ones may hold anything.

        Raises
        ------
        InputError
            Layers that do not exist or do not ascend, or an ``into`` that is too short or of other shapes or dtypes.
        """
        space, codec = self._space, self._space.codec
        chosen = self._chosen(layers)
        keys = self._keys[_start(first_chunk) :]
        if into is None:
            targets = [codec.empty(chosen) for _ in keys]
        elif len(into) < len(keys):
            raise InputError(f"into must have at least {len(keys)} chunks, got {len(into)}")
        else:
            targets = list(into[: len(keys)])
            for place, chunk in enumerate(targets):
                codec.check(chunk, chosen, f"into[{place}]")
        start = time.perf_counter()
        try:
            count = self._fill(keys, chosen, targets) if keys else 0
        except CapacityError:  # no memory to read into
            count = 0
        space.store.counters.add(
            loaded_tokens=count * space.layout.chunk_tokens,
            loaded_bytes=count * codec.bytes_of(chosen),
            load_seconds=time.perf_counter() - start,
            short_loads=int(count < len(keys)),
        )
        return targets[:count]

    def release(self) -> None:
        """Let the chunks go; idempotent."""
        self.lease.release()

    def _fill(self, keys: Sequence[bytes], layers: Sequence[int], targets: Sequence[KVChunk]) -> int:
        """Read and decode; how many leading chunks are right."""
        codec = self._space.codec
        size = codec.bytes_of(layers)
        ranges = None if size == codec.payload_bytes else codec.ranges(layers)
        done, ahead = 0, len(keys)
        with ExitStack() as stack:
            rows: torch.Tensor | None = None
            while done < len(keys):
                if ranges is None and (viewed := self._decode_in_place(keys[done:], layers, targets[done:])):
                    done, ahead = done + viewed, 1  # those that follow are likely to lie in memory, too
                    continue
                if rows is None:
                    rows = stack.enter_context(self._space.store.staging.rows(size, len(keys) - done))
                part = keys[done : done + min(ahead, len(rows))]
                right = self._decode_by_way_of(rows, part, ranges, layers, targets[done:])
                done, ahead = done + right, 2 * ahead
                if right < len(part):
                    break
        return done

    def _decode_in_place(self, keys: Sequence[bytes], layers: Sequence[int], targets: Sequence[KVChunk]) -> int:
        """Decode leading chunks from where they lie in memory, in threads if there are many; how many are right."""
        store, codec = self._space.store, self._space.codec
        with store.records.view(keys) as found:
            # Planned before the first byte moves, which would put all that planning needs out of the cache.
            plans = [codec.decoding(view.payload, layers, target) for view, target in zip(found, targets, strict=False)]
            jobs = list(map(partial, repeat(_decode_view), found, plans))
            seconds = store.workers.run(jobs, len(jobs) * codec.payload_bytes)
        right = list(takewhile(lambda spent: spent is not None, seconds))
        store.decoding.learn(len(right) * codec.payload_bytes, sum(filter(None, right)))
        return len(right)

    def _decode_by_way_of(
        self,
        rows: torch.Tensor,
        keys: Sequence[bytes],
        ranges: tuple[ByteRange, ...] | None,
        layers: Sequence[int],
        targets: Sequence[KVChunk],
    ) -> int:
        """Read some chunks into rows [n, bytes] and decode them; how many leading ones are right."""
        requests = [ReadRequest(key, row, ranges) for key, row in zip(keys, rows, strict=False)]
        served = self._space.store.records.read(requests)
        right = served.index(False) if False in served else len(served)
        self._decode(list(rows[:right]), layers, targets)
        return right

    def _decode(self, payloads: Sequence[torch.Tensor], layers: Sequence[int], targets: Sequence[KVChunk]) -> None:
        start = time.perf_counter()
        for payload, target in zip(payloads, targets, strict=False):
            self._space.codec.decode(payload, layers, target)
        nbytes = sum(payload.numel() for payload in payloads)
        self._space.store.decoding.learn(nbytes, time.perf_counter() - start)

    def _chosen(self, layers: Sequence[int] | None) -> Sequence[int]:
        count = len(self._space.layout.layers)
        if layers is None:
            return range(count)
        chosen = list(layers)
        if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= count:
            raise InputError(f"layers must ascend within 0 to {count - 1}, got {chosen}")
        return chosen

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _decode_view(found: RecordView, steps: Sequence[DecodingStep]) -> float | None:
    """Decode a chunk from where it lies: seconds that copies took, None when it proved damaged."""
    start = time.perf_counter()
    for stop, copy in steps:
        copy()  # first: it reads memory ahead of itself, so that digests find all in the cache
        if not found.verify(stop):
            return None
    return time.perf_counter() - start - found.seconds


def _start(first_chunk: int) -> int:
    if first_chunk < 0:
        raise InputError(f"first_chunk must be at least 0, got {first_chunk}")
    return first_chunk
