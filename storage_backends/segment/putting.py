"""One put: claim keys, find places, write, wait for the medium if so promised, and only then show."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvtier.record import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from kvtier.storage_backends.records import PutOutcome, PutState, Record
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.flusher import Flusher
from kvtier.storage_backends.segment.headers import HeaderCache
from kvtier.storage_backends.segment.journal import Journal
from kvtier.storage_backends.segment.reclaim import Reclaimer
from kvtier.storage_backends.segment.rows import rows_of
from kvtier.types import format_bytes

__all__ = ["put_records"]

_EXISTS = PutOutcome(PutState.EXISTS)
_STORED = PutOutcome(PutState.STORED)


def put_records(
    journal: Journal, flusher: Flusher, reclaimer: Reclaimer, records: Sequence[Record]
) -> list[PutOutcome]:
    """Store records; one outcome each."""
    catalog = journal.catalog
    first: dict[bytes, Record] = {}
    for record in records:
        first.setdefault(record.key, record)
    there = dict(zip(first, catalog.begin(list(first)).tolist(), strict=True))
    mine = [key for key, known in there.items() if not known]
    try:
        outcomes = _put_new(journal, flusher, [first[key] for key in mine])
    finally:
        catalog.end(mine)
    _make_ready(journal, reclaimer)
    result = []
    for record in records:
        # A second record of the same key in one call finds what became of the first.
        known = there[record.key]
        outcome = _EXISTS if known else outcomes[record.key]
        there[record.key] = known or outcome is _STORED
        result.append(outcome)
    return result


def _put_new(journal: Journal, flusher: Flusher, records: Sequence[Record]) -> dict[bytes, PutOutcome]:
    """Store records whose keys are not there and are claimed."""
    outcomes: dict[bytes, PutOutcome] = {}
    drafts = []
    for record in records:
        draft = _draft(record, journal.options.extent_bytes)
        most = min(journal.allocator.most_record_bytes, MAX_PAYLOAD_BYTES)
        if draft.record_bytes > most or draft.header_bytes > MAX_HEADER_BYTES:
            needed = f"the record needs {format_bytes(draft.record_bytes)} in one segment"
            reason = f"{needed}, which takes {format_bytes(most)}; raise segment_bytes or split the record"
            outcomes[record.key] = PutOutcome(PutState.REFUSED, reason)
        else:
            drafts.append(draft)
    if not drafts:
        return outcomes
    durable = journal.options.durability == "durable"
    _number(journal.catalog, drafts)
    reason = journal.allocator.place(drafts)
    placed = [draft for draft in drafts if draft.segment is not None]
    try:
        journal.write(placed, sync=durable)
        if not durable:
            flusher.wrote(placed)
        _publish(journal.catalog, placed)
        _remember(journal.headers, placed)
    finally:
        journal.allocator.written(placed)
    for draft in drafts:
        outcomes[draft.key] = _outcome(draft, reason)
    _count(journal, drafts, len(outcomes))
    return outcomes


def _number(catalog: Catalog, drafts: Sequence[Draft]) -> None:
    """Look up the numbers of tenants and namespaces, which the rows will say."""
    with catalog.lock:
        for draft in drafts:
            draft.tenant_number = catalog.tenants.number(draft.tenant.encode())
            draft.namespace_number = catalog.namespaces.number(draft.namespace)


def _outcome(draft: Draft, reason: str) -> PutOutcome:
    """What became of a draft; ``reason`` says why the last ones got no place."""
    if draft.segment is None:
        return PutOutcome(PutState.REFUSED, reason)
    if draft.error is not None:
        return PutOutcome(PutState.REFUSED, f"the medium does not take it: {draft.error.strerror or draft.error}")
    return _STORED


def _publish(catalog: Catalog, drafts: Sequence[Draft]) -> None:
    """Make those that arrived visible."""
    rows = [draft.row for draft in drafts if draft.arrived]
    if rows:
        catalog.publish(rows_of(rows))


def _remember(headers: HeaderCache, drafts: Sequence[Draft]) -> None:
    """Keep the digests at hand: what was put is often read soon, and then needs no header from the medium."""
    headers.add(
        ((draft.segment.number, draft.header.epoch, draft.offset), draft.header)
        for draft in drafts
        if draft.error is None and draft.header is not None and draft.segment is not None
    )


def _count(journal: Journal, drafts: Sequence[Draft], asked: int) -> None:
    """Keep the counters, and say whether the medium takes records."""
    failed = [draft.error for draft in drafts if draft.error is not None]
    stored = [draft for draft in drafts if draft.error is None and draft.segment is not None]
    if failed:
        journal.degraded = f"the medium does not take records: {failed[0].strerror or failed[0]}"
    elif stored:
        journal.degraded = ""
    with journal.catalog.lock:
        counters = journal.catalog.counters
        counters.failed += len(failed)
        counters.stored += len(stored)
        counters.refused += asked - len(stored)
        counters.written_bytes += sum(draft.payload_bytes for draft in stored)


def _make_ready(journal: Journal, reclaimer: Reclaimer) -> None:
    """Clear the next segment in time, if no other thread is at it."""
    turn = journal.allocator.turn
    if reclaimer.is_due and turn.acquire(blocking=False):
        try:
            if reclaimer.is_due:
                reclaimer.prepare()
        finally:
            turn.release()


def _draft(record: Record, extent_bytes: int) -> Draft:
    return Draft(
        key=record.key,
        namespace=record.namespace,
        tenant=record.tenant,
        meta=record.meta,
        buffers=record.buffers,
        extent_bytes=extent_bytes,
        created_us=time.time_ns() // 1000,
    )
