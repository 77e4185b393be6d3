"""Record stores one above the other: written through to the lowest, copies kept above, hits promoted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress

import numpy as np

from kvtier.errors import ConfigError
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.leases import JoinedLease
from kvtier.storage_backends.rates import TransferRate
from kvtier.storage_backends.records import (
    BoolArray,
    Lease,
    PutOutcome,
    PutState,
    ReadRequest,
    Record,
    RecordInfo,
    RecordStats,
    RecordStore,
    RecordView,
)
from kvtier.storage_backends.slots import IntArray

__all__ = ["TieredRecords"]

_PROMOTED_SHARE = 2  # one read may fill half of the tier above


class TieredRecords(RecordStore):
    """Ordered tiers as one record store.

    A put goes to the lowest tier and leaves copies above it, so demotion is dropping a copy. What the lowest tier
    refuses lives in the copies alone; its outcome is STORED with the reason. A whole record that is read below is
    copied upwards. A record that is damaged in one tier is read from the next.

    Parameters
    ----------
    tiers : sequence of RecordStore
        Fastest first; owned, closed together.
    rates : sequence of TransferRate, optional
        One for each tier, taught by its reads; copying upwards is a part of them.

    Notes
    -----
    Copies are made upwards under one lock, which `delete` and `clear` take too, and not at all when one of these came
    between the read or put below and the copy: what was deleted does not come back.
    """

    def __init__(self, tiers: Sequence[RecordStore], rates: Sequence[TransferRate] | None = None) -> None:
        if not tiers:
            raise ConfigError("tiered records need at least one tier, got none")
        self.tiers = tuple(tiers)
        self.rates = tuple(rates) if rates else tuple(TransferRate(latency=1e-4, bandwidth=1e9) for _ in tiers)
        self._lock = threading.Lock()  # taken before those of the tiers
        self._deletions = 0
        self._counting = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def promoted_bytes(self) -> int:
        """Payload bytes copied upwards by reads."""
        return self._counts["promoted_bytes"]

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Put into the lowest tier, then keep copies above."""
        deletions = self._deletions
        outcomes = self.tiers[-1].put(records)
        for tier in reversed(self.tiers[:-1]):
            self._copy_up(tier, records, outcomes, deletions)
        taken = [record for record, outcome in zip(records, outcomes, strict=True) if outcome.state is PutState.STORED]
        self._count(
            stored=len(taken),
            refused=sum(outcome.state is PutState.REFUSED for outcome in outcomes),
            written_bytes=sum(record.payload_bytes for record in taken),
        )
        return outcomes

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys any tier has [n]."""
        return self.locate(keys) >= 0

    def locate(self, keys: Sequence[bytes]) -> IntArray:
        """The highest tier that has each key, int64 [n]; -1 where none has."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for level, tier in reversed(list(enumerate(self.tiers))):
            found[tier.contains(keys)] = level
        return found

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Read each record from the highest tier that has it right, and copy upwards what came from below."""
        served = [False] * len(requests)
        deletions = self._deletions
        for level, tier in enumerate(self.tiers):
            waiting = [index for index, done in enumerate(served) if not done]
            there = tier.contains([requests[index].key for index in waiting])
            asked = list(compress(waiting, there))
            start = time.perf_counter()
            for index, verified in zip(asked, tier.read([requests[index] for index in asked]), strict=True):
                served[index] = verified
            right = [requests[index] for index in asked if served[index]]
            if level:
                self._promote(level, right, deletions)
            if len(right) == len(asked):
                self.rates[level].learn(sum(request.into.numel() for request in right), time.perf_counter() - start)
        self._count(
            hits=sum(served),
            misses=len(served) - sum(served),
            read_bytes=sum(request.into.numel() for request in compress(requests, served)),
        )
        return served

    @contextmanager
    def view(self, keys: Sequence[bytes]) -> Iterator[Sequence[RecordView]]:
        """View in the highest tier."""
        with self.tiers[0].view(keys) as found:
            yield found
            served = [view for view in found if view.served]
            if served:
                nbytes = sum(view.payload.numel() for view in served)
                self.rates[0].learn(nbytes, sum(view.seconds for view in served))
                self._count(hits=len(served), read_bytes=nbytes)

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Lease every copy of those of ``keys`` that exist."""
        return JoinedLease([tier.lease(keys, owner=owner, seconds=seconds) for tier in reversed(self.tiers)], keys)

    def info(self, key: bytes) -> RecordInfo | None:
        """What the highest tier that has a record knows of it."""
        return next((info for tier in self.tiers if (info := tier.info(key)) is not None), None)

    def scan(self) -> Iterator[RecordInfo]:
        """Every record once, those of the lowest tier first."""
        yield from self.tiers[-1].scan()
        yield from self._only_above()

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget records in every tier; how many there were."""
        with self._lock:
            self._deletions += 1
            levels = self.locate(list(dict.fromkeys(keys)))
            found = int(np.count_nonzero(levels >= 0))
            deleted = self.tiers[-1].delete(keys)
            for tier in self.tiers[:-1]:
                tier.delete(keys)
        self._count(only_above=deleted - found)
        return found

    def clear(self, tenant: str | None = None) -> int:
        """Forget every record of a tenant, or all, in every tier; how many there were."""
        with self._lock:
            self._deletions += 1
            found = sum(tenant in (None, info.tenant) for info in self._only_above())
            self._count(only_above=-found)
            found += self.tiers[-1].clear(tenant)
            for tier in self.tiers[:-1]:
                tier.clear(tenant)
        return found

    def stats(self) -> RecordStats:
        """Records, tenants and live bytes without their copies above; other bytes summed over the tiers.

        Hits, misses, puts, refusals and evictions are those of this store as a whole.
        """
        parts = [tier.stats() for tier in self.tiers]
        only_above = list(self._only_above())
        tenants = Counter(parts[-1].tenants)
        for info in only_above:
            tenants[info.tenant] += info.payload_bytes
        with self._counting:
            counts = self._counts.copy()
        return RecordStats(
            records=parts[-1].records + len(only_above),
            live_bytes=tenants.total(),
            dead_bytes=sum(part.dead_bytes for part in parts),
            held_bytes=sum(part.held_bytes for part in parts),
            capacity_bytes=sum(part.capacity_bytes for part in parts),
            leased_bytes=sum(part.leased_bytes for part in parts),
            hits=counts["hits"],
            misses=counts["misses"],
            damaged=sum(part.damaged for part in parts),
            failed=sum(part.failed for part in parts),
            # Evicted below, but still above: not gone yet.
            evicted=max(0, parts[-1].evicted + counts["only_above"] - len(only_above)),
            refused=counts["refused"],
            stored=counts["stored"],
            read_bytes=counts["read_bytes"],
            written_bytes=counts["written_bytes"],
            degraded="; ".join(part.degraded for part in parts if part.degraded),
            tenants=dict(tenants),
        )

    def capabilities(self) -> Capabilities:
        """Those of the lowest tier, which is what outlives the process."""
        return self.tiers[-1].capabilities()

    def flush(self) -> None:
        """Flush every tier."""
        for tier in self.tiers:
            tier.flush()

    def close(self) -> None:
        """Close every tier, the lowest last."""
        for tier in self.tiers:
            tier.close()

    def _copy_up(
        self, tier: RecordStore, records: Sequence[Record], outcomes: list[PutOutcome], deletions: int
    ) -> None:
        """Put copies of what was just put below, and what was refused there; ``outcomes`` follow.

        What exists below is copied when it is read: its bytes may be others than those that were offered.
        """
        refused = [outcome.state is PutState.REFUSED for outcome in outcomes]
        stored = [outcome.state is PutState.STORED for outcome in outcomes]
        with self._lock:
            # A copy whose original had gone is replaced with it: tiers never disagree.
            tier.delete([record.key for record in compress(records, stored)])
            kept = [n for n in range(len(records)) if refused[n] or (stored[n] and deletions == self._deletions)]
            copies = tier.put([records[n] for n in kept])
        for n, copy in zip(kept, copies, strict=True):
            if refused[n] and copy.state is not PutState.REFUSED:
                outcomes[n] = PutOutcome(copy.state, outcomes[n].reason)
                self._count(only_above=int(copy.state is PutState.STORED))

    def _promote(self, level: int, requests: Sequence[ReadRequest], deletions: int) -> None:
        """Copy whole records that were just read at ``level`` into the tiers above."""
        whole = [request for request in requests if request.ranges is None]
        below = self.tiers[level]
        for tier in reversed(self.tiers[:level]):
            room = tier.stats().capacity_bytes // _PROMOTED_SHARE if whole else 0
            records = []
            for request in whole:
                room -= request.into.numel()
                info = below.info(request.key)
                if room >= 0 and info is not None:
                    records.append(_copy_of(info, request))
            with self._lock:
                outcomes = tier.put(records) if deletions == self._deletions else []
            self._count(
                promoted_bytes=sum(
                    record.payload_bytes
                    for record, outcome in zip(records, outcomes, strict=False)
                    if outcome.state is PutState.STORED
                )
            )

    def _only_above(self) -> Iterator[RecordInfo]:
        """Records that no tier below the one that has them has too, but for those of the lowest."""
        for level, tier in reversed(list(enumerate(self.tiers[:-1]))):
            infos = list(tier.scan())
            keys = [info.key for info in infos]
            below = np.logical_or.reduce([other.contains(keys) for other in self.tiers[level + 1 :]])
            yield from compress(infos, ~below)

    def _count(self, **more: int) -> None:
        with self._counting:
            self._counts.update(more)


def _copy_of(info: RecordInfo, request: ReadRequest) -> Record:
    """The record that a whole read brought."""
    return Record(key=info.key, namespace=info.namespace, buffers=[request.into], tenant=info.tenant, meta=info.meta)
