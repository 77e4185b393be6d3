"""Quotas: no tenant takes more bytes of a record store than its share."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress

from kvtier.storage_backends.leases import JoinedLease, LeaseBook
from kvtier.storage_backends.memory import PAGE_BYTES, round_up
from kvtier.storage_backends.record_wrappers import WrappedRecords
from kvtier.storage_backends.records import KEY_BYTES, Lease, PutOutcome, PutState, Record, RecordStats, RecordStore
from kvtier.types import format_bytes

__all__ = ["QuotaRecords"]

_SLACK_KEYS = 1024


class QuotaRecords(WrappedRecords):
    """Keeps a tenant's live bytes within its quota: the tenant's own oldest records make room.

    Of the records of one `put`, the last counts as the oldest: what is left of a prefix is a prefix. Records under a
    lease stay; what then finds no room is refused.

    Parameters
    ----------
    inner : RecordStore
    quotas : mapping of str to int
        Most live bytes of a tenant, headers and padding included. Tenants that are not named have no bound.

    Notes
    -----
    Puts of tenants with a quota take turns.
    """

    def __init__(self, inner: RecordStore, quotas: Mapping[str, int]) -> None:
        super().__init__(inner)
        self._quotas = dict(quotas)
        self._lock = threading.Lock()
        self._leases = LeaseBook()
        self._refused = 0
        self._dropped = 0
        # Keys end to end, the oldest first: bytes are taken off the front of a bytearray without moving the rest.
        self._by_age: dict[str, bytearray] = {tenant: bytearray() for tenant in quotas}
        for info in inner.scan() if quotas else ():
            if info.tenant in quotas:
                self._by_age[info.tenant] += info.key

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Put what fits into the quotas, after making room."""
        if not any(record.tenant in self._quotas for record in records):
            return super().put(records)
        with self._lock:
            admitted = self._admitted(records)
            outcomes = iter(super().put(list(compress(records, admitted))))
            results = [
                next(outcomes) if taken else self._refusal(record.tenant)
                for record, taken in zip(records, admitted, strict=True)
            ]
            self._remember(records, results)
            self._refused += admitted.count(False)
        return results

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Lease in the inner store, against this wrapper too."""
        inner = super().lease(keys, owner=owner, seconds=seconds)
        return JoinedLease([inner, self._leases.take(inner.keys, owner=owner, seconds=seconds)], keys)

    def stats(self) -> RecordStats:
        """What the inner store counts, and what was refused and dropped for a quota."""
        stats = super().stats()
        return replace(stats, refused=stats.refused + self._refused, evicted=stats.evicted + self._dropped)

    def _admitted(self, records: Sequence[Record]) -> list[bool]:
        """Which records may be put, room for them made."""
        there = self.contains([record.key for record in records])
        needs = [0 if old else _footprint(record.payload_bytes) for record, old in zip(records, there, strict=True)]
        left: dict[str, int] = {}
        for tenant in {record.tenant for record in records} & self._quotas.keys():
            quota = self._quotas[tenant]
            wanted = sum(
                need for record, need in zip(records, needs, strict=True) if record.tenant == tenant and need <= quota
            )
            left[tenant] = quota - self._trim(tenant, max(0, quota - wanted))
        admitted = []
        for record, need in zip(records, needs, strict=True):
            fits = record.tenant not in left or need <= left[record.tenant]
            admitted.append(fits)
            if fits and record.tenant in left:
                left[record.tenant] -= need
        return admitted

    def _remember(self, records: Sequence[Record], results: Sequence[PutOutcome]) -> None:
        """Note the age of what was stored, and cut what took more than was expected."""
        for record, result in zip(reversed(records), reversed(results), strict=True):
            if result.state is PutState.STORED and record.tenant in self._quotas:
                self._by_age[record.tenant] += record.key
        for tenant in {record.tenant for record in records} & self._quotas.keys():
            self._trim(tenant, self._quotas[tenant])
            self._forget_missing(tenant)

    def _trim(self, tenant: str, allowed: int) -> int:
        """Delete the tenant's oldest records until it has no more than ``allowed`` bytes; what it has then."""
        while (live := self.inner.stats().tenants.get(tenant, 0)) > allowed:
            victims = self._oldest(tenant, live - allowed)
            if not victims:
                break
            self._dropped += self.inner.delete(victims)
        return live

    def _oldest(self, tenant: str, nbytes: int) -> list[bytes]:
        """The tenant's oldest keys that are not leased, of ``nbytes`` together; taken off the list."""
        ages = self._by_age[tenant]
        victims: list[bytes] = []
        leased: list[bytes] = []
        while nbytes > 0 and ages:
            key = bytes(ages[:KEY_BYTES])
            del ages[:KEY_BYTES]
            info = self.inner.info(key)
            if info is not None and self._leases.holds(key):
                leased.append(key)
            elif info is not None:
                victims.append(key)
                nbytes -= info.payload_bytes
        ages[:0] = b"".join(leased)
        return victims

    def _forget_missing(self, tenant: str) -> None:
        """Drop keys that the inner store let go, once they are many."""
        ages = self._by_age[tenant]
        if len(ages) > KEY_BYTES * (2 * self.inner.stats().records + _SLACK_KEYS):
            keys = [bytes(ages[at : at + KEY_BYTES]) for at in range(0, len(ages), KEY_BYTES)]
            self._by_age[tenant] = bytearray().join(compress(keys, self.inner.contains(keys)))

    def _refusal(self, tenant: str) -> PutOutcome:
        quota = format_bytes(self._quotas[tenant])
        return PutOutcome(PutState.REFUSED, f"tenant {tenant!r} has a quota of {quota}, and nothing old enough to go")


def _footprint(payload_bytes: int) -> int:
    """Bytes that a record takes on the medium, about: a header and padding."""
    return round_up(payload_bytes, PAGE_BYTES) + PAGE_BYTES
