"""A namespace: the chunks of one model, layout and tenant in a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.core.chunks import ChunkCodec, KVChunk
from kvtier.core.hit import Hit
from kvtier.core.load_worth import RecomputeRate, StoredPrefix, decide
from kvtier.core.prefix import ChunkMeta, TokenIds, chunk_keys, token_bytes
from kvtier.core.store_stats import PutReport
from kvtier.errors import CapacityError, InputError
from kvtier.storage_backends.records import BoolArray, PutOutcome, PutState, Record
from kvtier.types import KVLayout

if TYPE_CHECKING:
    from kvtier.core.store import Store

__all__ = ["Namespace"]

_PUT_LEASE_SECONDS = 60.0


class Namespace:
    """Stored prefixes of one model, layout and tenant; made by `Store.namespace`.

    Attributes
    ----------
    layout : KVLayout
        Shapes of the chunks.
    tenant : str
        Who pays for the bytes.
    digest : bytes
        Stands for all that sets this namespace apart, 32 bytes.

    Notes
    -----
    Any thread may call anything.
    """

    def __init__(self, store: Store, layout: KVLayout, tenant: str, digest: bytes) -> None:
        self.store = store
        self.layout = layout
        self.tenant = tenant
        self.digest = digest
        self.codec = ChunkCodec(layout)

    def put(self, token_ids: TokenIds, chunks: Sequence[KVChunk], *, first_chunk: int = 0) -> PutReport:
        """Store the chunks of a prefix; those that are stored already are left as they are.

        Parameters
        ----------
        token_ids : sequence, array or tensor of int [T]
            The prompt from its first token on, at least to the end of the last chunk.
        chunks : sequence of KVChunk
            Chunks ``first_chunk``, ``first_chunk + 1``, ... of the prompt, ``layout.chunk_tokens`` tokens each.
        first_chunk : int
            Chunks before the first one given.

        Returns
        -------
        PutReport
            After the first chunk that is refused, the rest is too: it could not be found without it.

        Raises
        ------
        InputError
            Tokens that do not reach as far as the chunks, or tensors of other shapes or dtypes; nothing was stored.
        """
        keys = self._checked(token_ids, chunks, first_chunk)
        return self._put(keys, chunks, first_chunk) if chunks else PutReport()

    def publish(self, token_ids: TokenIds, chunks: Sequence[KVChunk], *, first_chunk: int = 0) -> Future[PutReport]:
        """`put` in the background, in the order of the calls.

        Leading chunks that fit the store's queue are put, the others refused at once. The tensors must not change
        before the future is done. `Store.flush` and `Store.close` wait for it.

        Raises
        ------
        InputError
            As `put`.
        """
        keys = self._checked(token_ids, chunks, first_chunk)
        chunks = list(chunks)
        return self.store.publisher.submit(
            lambda count: self._put(keys, chunks[:count], first_chunk), len(chunks), self.codec.payload_bytes
        )

    def match(
        self,
        token_ids: TokenIds,
        *,
        recompute: RecomputeRate | None = None,
        owner: str = "match",
        lease_seconds: float = 60.0,
    ) -> Hit:
        """The longest stored prefix of some tokens, leased.

        Parameters
        ----------
        token_ids : sequence, array or tensor of int [T]
        recompute : RecomputeRate, optional
            How fast the model prefills: the hit then ends where computing on is predicted to be faster than loading.
        owner : str
            Who holds the lease, for reports.
        lease_seconds : float
            How long the chunks are kept from eviction, unless the hit is released before.

        Returns
        -------
        Hit
            With ``tokens == 0`` when nothing is stored. Release it, or use it in a ``with`` block.
        """
        records, chunk_tokens = self.store.records, self.layout.chunk_tokens
        keys = self.keys(token_ids)
        lease = records.lease(keys[: _leading(records.contains(keys))], owner=owner, seconds=lease_seconds)
        held = set(lease.keys)
        found = keys[: _leading(np.fromiter((key in held for key in keys), dtype=np.bool_, count=len(keys)))]
        decision = None
        if recompute is not None and found:
            prefix = StoredPrefix(
                tiers=self.store.locate(found).tolist(),
                chunk_bytes=self.codec.payload_bytes,
                chunk_tokens=chunk_tokens,
            )
            decision = decide(prefix, recompute, self.store.rates, self.store.decoding)
            self.store.counters.add(
                decisions=1,
                declined=int(decision.tokens < decision.stored_tokens),
                transfer_seconds=decision.transfer_seconds,
                recompute_seconds=decision.recompute_seconds,
            )
        self.store.counters.add(
            matches=1,
            hits=int(bool(found)),
            requested_tokens=len(keys) * chunk_tokens,
            matched_tokens=len(found) * chunk_tokens,
        )
        return Hit(self, found, lease, decision)

    def delete(self, token_ids: TokenIds) -> int:
        """Forget every stored chunk of a prefix, also those that other prefixes begin with; how many there were."""
        return self.store.records.delete(self.keys(token_ids))

    def keys(self, token_ids: TokenIds) -> list[bytes]:
        """The keys of the full chunks of some tokens."""
        return chunk_keys(self.digest, token_bytes(token_ids), self.layout.chunk_tokens)

    def _checked(self, token_ids: TokenIds, chunks: Sequence[KVChunk], first_chunk: int) -> list[bytes]:
        """The keys of the tokens, after a check that the chunks are theirs."""
        keys = self.keys(token_ids)
        if first_chunk < 0 or first_chunk + len(chunks) > len(keys):
            raise InputError(
                f"token_ids must hold {self.layout.chunk_tokens} tokens for each of the chunks {first_chunk} to "
                f"{first_chunk + len(chunks) - 1}, got {len(keys)} full chunks"
            )
        for place, chunk in enumerate(chunks):
            self.codec.check(chunk, range(len(self.layout.layers)), f"chunks[{place}]")
        return keys

    def _put(self, keys: Sequence[bytes], chunks: Sequence[KVChunk], first_chunk: int) -> PutReport:
        """Put chunks in batches, up to the first refusal; what was put is leased until the last is."""
        outcomes: list[PutOutcome] = []
        records = self.store.records
        try:
            with ExitStack() as leases, self.store.staging.rows(self.codec.payload_bytes, len(chunks)) as rows:
                for at in range(0, len(chunks), len(rows)):
                    part = slice(first_chunk + at, first_chunk + at + len(rows))
                    outcomes += self._put_batch(keys, chunks[at : at + len(rows)], part.start, rows)
                    if outcomes[-1].state is PutState.REFUSED:
                        break
                    leases.enter_context(records.lease(keys[part], owner="put", seconds=_PUT_LEASE_SECONDS))
        except CapacityError as error:  # no memory to encode into
            outcomes.append(PutOutcome(PutState.REFUSED, str(error)))
        report = _report(outcomes, len(chunks))
        self.store.counters.add_put(report)
        return report

    def _put_batch(
        self, keys: Sequence[bytes], chunks: Sequence[KVChunk], first_chunk: int, rows: torch.Tensor
    ) -> list[PutOutcome]:
        """Encode those chunks that are not there yet and put them side by side."""
        there = self.store.records.contains(keys[first_chunk : first_chunk + len(chunks)])
        records = []
        for place in np.flatnonzero(~there).tolist():
            number = first_chunk + place
            payload = rows[place]
            self.codec.encode(chunks[place], payload)
            parent = keys[number - 1] if number else self.digest
            records.append(
                Record(
                    key=keys[number],
                    namespace=self.digest,
                    buffers=[payload],
                    tenant=self.tenant,
                    meta=ChunkMeta(number, self.layout.chunk_tokens, parent).pack(),
                )
            )
        put = iter(self.store.records.put(records))
        return [PutOutcome(PutState.EXISTS) if old else next(put) for old in there]


def _leading(flags: BoolArray) -> int:
    """How many flags are set before the first that is not."""
    return int(np.argmin(flags)) if flags.size and not flags.all() else flags.size


def _report(outcomes: Sequence[PutOutcome], chunks: int) -> PutReport:
    """Sum up; what was not tried after a refusal counts as refused."""
    states = Counter(outcome.state for outcome in outcomes)
    return PutReport(
        stored=states[PutState.STORED],
        existing=states[PutState.EXISTS],
        refused=chunks - states[PutState.STORED] - states[PutState.EXISTS],
        reason=next((outcome.reason for outcome in outcomes if outcome.reason), ""),
        volatile=sum(bool(outcome.reason) for outcome in outcomes if outcome.state is PutState.STORED),
    )
