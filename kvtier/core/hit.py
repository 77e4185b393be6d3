"""A stored prefix that was found: leased, and loaded chunk by chunk with every byte verified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch

from kvtier.core.chunks import KVChunk
from kvtier.core.load_worth import LoadDecision
from kvtier.errors import InputError
from kvtier.storage_backends.memory import PAGE_BYTES, empty_aligned, round_up
from kvtier.storage_backends.records import Lease, ReadRequest

if TYPE_CHECKING:
    from types import TracebackType

    from kvtier.core.namespace import Namespace

__all__ = ["STAGING_BYTES", "Hit"]

STAGING_BYTES = 64 << 20
"""Payload bytes that are moved at a time."""


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
        count = self._fill(keys, chosen, targets)
        size = sum(length for _, length in codec.ranges(chosen))
        space.store.counters.add(
            loaded_tokens=count * space.layout.chunk_tokens,
            loaded_bytes=count * size,
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
        ranges = codec.ranges(layers)
        size = sum(length for _, length in ranges)
        whole = size == codec.payload_bytes
        stride = round_up(size, PAGE_BYTES)
        batch = max(1, STAGING_BYTES // max(1, stride))
        staging = empty_aligned(stride * min(batch, len(keys))) if keys and size else torch.empty(0, dtype=torch.uint8)
        for at in range(0, len(keys), batch):
            payloads = [staging[place * stride : place * stride + size] for place in range(len(keys[at : at + batch]))]
            requests = [
                ReadRequest(key, payload, None if whole else ranges)
                for key, payload in zip(keys[at : at + batch], payloads, strict=True)
            ]
            for place, right in enumerate(self._space.store.records.read(requests)):
                if not right:
                    return at + place
                codec.decode(payloads[place], layers, targets[at + place])
        return len(keys)

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


def _start(first_chunk: int) -> int:
    if first_chunk < 0:
        raise InputError(f"first_chunk must be at least 0, got {first_chunk}")
    return first_chunk
