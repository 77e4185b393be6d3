"""Record stores one above the other: written through to the lowest, copies kept above, hits promoted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
    Copies are made upwards under one lock, which `delete` and `clear` take too: what was deleted does not come back.
    """

    def __init__(self, tiers: Sequence[RecordStore], rates: Sequence[TransferRate] | None = None) -> None:
        if not tiers:
            raise ConfigError("tiered records need at least one tier, got none")
        self.tiers = tuple(tiers)
        self.rates = tuple(rates) if rates else tuple(TransferRate(latency=1e-4, bandwidth=1e9) for _ in tiers)
        self._lock = threading.Lock()  # taken before those of the tiers
        self._counting = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def promoted_bytes(self) -> int:
        """Payload bytes copied upwards by reads."""
        return self._counts["promoted_bytes"]

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Put into the lowest tier, then keep copies above."""
        lowest = self.tiers[-1]
        outcomes = lowest.put(records)
        for tier in reversed(self.tiers[:-1]):
            with self._lock:
                # Taken below and not there any more: deleted meanwhile.
                there = lowest.contains([record.key for record in records])
                kept = [
                    index
                    for index, outcome in enumerate(outcomes)
                    if there[index] or outcome.state is PutState.REFUSED or outcome.reason
                ]
                copies = tier.put([records[index] for index in kept])
            for index, copy in zip(kept, copies, strict=True):
                if outcomes[index].state is PutState.REFUSED and copy.state is not PutState.REFUSED:
                    outcomes[index] = PutOutcome(copy.state, outcomes[index].reason)
        taken = [index for index, outcome in enumerate(outcomes) if outcome.state is PutState.STORED]
        self._count(
            stored=len(taken),
            refused=sum(outcome.state is PutState.REFUSED for outcome in outcomes),
            written_bytes=sum(records[index].payload_bytes for index in taken),
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
        for level, tier in enumerate(self.tiers):
            waiting = [index for index, done in enumerate(served) if not done]
            there = tier.contains([requests[index].key for index in waiting])
            asked = list(compress(waiting, there))
            start = time.perf_counter()
            for index, verified in zip(asked, tier.read([requests[index] for index in asked]), strict=True):
                served[index] = verified
            right = [requests[index] for index in asked if served[index]]
            if level:
                self._promote(level, right)
            if len(right) == len(asked):
                self.rates[level].learn(sum(request.into.numel() for request in right), time.perf_counter() - start)
        self._count(
            hits=sum(served),
            misses=len(served) - sum(served),
            read_bytes=sum(request.into.numel() for request in compress(requests, served)),
        )
        return served

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Lease every copy of those of ``keys`` that exist."""
        return JoinedLease([tier.lease(keys, owner=owner, seconds=seconds) for tier in reversed(self.tiers)], keys)

    def info(self, key: bytes) -> RecordInfo | None:
        """What the highest tier that has a record knows of it."""
        return next((info for tier in self.tiers if (info := tier.info(key)) is not None), None)

    def scan(self) -> Iterator[RecordInfo]:
        """Every record once, from the lowest tier upwards."""
        for level, tier in reversed(list(enumerate(self.tiers))):
            for info in tier.scan():
                if not any(below.contains([info.key])[0] for below in self.tiers[level + 1 :]):
                    yield info

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget records in every tier; how many there were."""
        with self._lock:
            found = int(np.count_nonzero(self.contains(keys)))
            for tier in reversed(self.tiers):
                tier.delete(keys)
        return found

    def clear(self, tenant: str | None = None) -> int:
        """Forget every record of a tenant, or all, in every tier; how many there were."""
        with self._lock:
            found = sum(1 for info in self.scan() if tenant in (None, info.tenant))
            for tier in reversed(self.tiers):
                tier.clear(tenant)
        return found

    def stats(self) -> RecordStats:
        """Bytes summed over the tiers; records and tenants of their union; reads and puts as this store saw them."""
        parts = [tier.stats() for tier in self.tiers]
        with self._counting:
            counts = self._counts.copy()
        return RecordStats(
            records=parts[-1].records + sum(1 for _ in self._only_above()),
            live_bytes=sum(part.live_bytes for part in parts),
            dead_bytes=sum(part.dead_bytes for part in parts),
            held_bytes=sum(part.held_bytes for part in parts),
            capacity_bytes=sum(part.capacity_bytes for part in parts),
            leased_bytes=sum(part.leased_bytes for part in parts),
            hits=counts["hits"],
            misses=counts["misses"],
            damaged=sum(part.damaged for part in parts),
            failed=sum(part.failed for part in parts),
            evicted=parts[-1].evicted,
            refused=counts["refused"],
            stored=counts["stored"],
            read_bytes=counts["read_bytes"],
            written_bytes=counts["written_bytes"],
            degraded="; ".join(part.degraded for part in parts if part.degraded),
            tenants={
                tenant: sum(part.tenants.get(tenant, 0) for part in parts)
                for tenant in sorted(set().union(*(part.tenants for part in parts)))
            },
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

    def _promote(self, level: int, requests: Sequence[ReadRequest]) -> None:
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
                there = below.contains([record.key for record in records])
                outcomes = tier.put(list(compress(records, there)))
            self._count(
                promoted_bytes=sum(
                    record.payload_bytes
                    for record, outcome in zip(compress(records, there), outcomes, strict=True)
                    if outcome.state is PutState.STORED
                )
            )

    def _only_above(self) -> Iterator[bytes]:
        """Keys that the lowest tier does not have."""
        for level, tier in enumerate(self.tiers[:-1]):
            keys = [info.key for info in tier.scan()]
            elsewhere = self.tiers[level + 1 :]
            below = np.logical_or.reduce([other.contains(keys) for other in elsewhere])
            yield from compress(keys, ~below)

    def _count(self, **more: int) -> None:
        with self._counting:
            self._counts.update(more)


def _copy_of(info: RecordInfo, request: ReadRequest) -> Record:
    """The record that a whole read brought."""
    return Record(key=info.key, namespace=info.namespace, buffers=[request.into], tenant=info.tenant, meta=info.meta)
