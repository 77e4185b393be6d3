"""One read: look the records up, hold their segments, fetch, and judge what came."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvtier.errors import InputError
from kvtier.record import BLOCK_BYTES
from kvtier.storage_backends.record_table import NOWHERE, IndexArray
from kvtier.storage_backends.records import ReadRequest, RecordInfo
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.journal import Journal
from kvtier.storage_backends.segment.pool import Segment, SegmentPool
from kvtier.storage_backends.segment.reader import Fetch, Found, whole
from kvtier.storage_backends.segment.rows import unpack

__all__ = ["pin_rows", "put_aside", "read_infos", "read_requests", "unpin"]

_NOTHING = torch.empty(0, dtype=torch.uint8)


def read_requests(journal: Journal, requests: Sequence[ReadRequest]) -> list[bool]:
    """Fill the requests that can be filled."""
    for request in requests:
        _check(request)
    catalog = journal.catalog
    with catalog.lock:
        rows = catalog.find([request.key for request in requests])
        pinned = pin_rows(catalog, journal.pool, rows)
        known = unpack(catalog.table.at[rows])
    fetches: list[Fetch | None] = [None] * len(requests)
    try:
        journal.read(_coming(journal, requests, rows, known, fetches))
    finally:
        unpin(catalog, pinned)
    outcomes = [None if fetch is None else fetch.outcome() for fetch in fetches]
    put_aside(journal, fetches, outcomes)
    _count(journal, requests, outcomes, rows)
    return [outcome is Found.RIGHT for outcome in outcomes]


def _coming(
    journal: Journal, requests: Sequence[ReadRequest], rows: IndexArray, known: Sequence[tuple[int, ...]],
    fetches: list[Fetch | None],
) -> Iterator[Fetch]:  # fmt: skip
    """Fetches in the order of the medium, noted where their requests stand; drawn while the first are read."""
    there = [at for at, row in enumerate(rows.tolist()) if row >= 0]
    for at in sorted(there, key=lambda at: known[at][1:3]):
        fetch = fetches[at] = _fetch(journal, known[at], requests[at])
        if fetch is not None:
            yield fetch


def read_infos(journal: Journal, rows: IndexArray) -> list[RecordInfo]:
    """What the headers of rows say; those that went or are damaged are left out."""
    catalog = journal.catalog
    with catalog.lock:
        rows = rows[catalog.table.at["segment"][rows] != NOWHERE]
        pinned = pin_rows(catalog, journal.pool, rows)
        keys = catalog.table.keys(rows)
        hits = catalog.table.at["hits"][rows].tolist()
        fetches: list[Fetch | None] = [
            _fetch(journal, at, ReadRequest(key.tobytes(), _NOTHING, ()))
            for at, key in zip(unpack(catalog.table.at[rows]), keys, strict=True)
        ]
    try:
        journal.read([fetch for fetch in fetches if fetch is not None])
    finally:
        unpin(catalog, pinned)
    outcomes = [None if fetch is None else fetch.outcome() for fetch in fetches]
    put_aside(journal, fetches, outcomes)
    infos = []
    for fetch, outcome, count in zip(fetches, outcomes, hits, strict=True):
        if fetch is None or fetch.header is None or outcome is not Found.RIGHT:
            continue
        header = fetch.header
        infos.append(
            RecordInfo(
                key=header.key,
                namespace=header.namespace,
                tenant=header.tenant,
                payload_bytes=header.payload_bytes,
                meta=header.meta,
                sequence=header.sequence,
                created=header.created_us / 1e6,
                hits=count,
            )
        )
    return infos


def _check(request: ReadRequest) -> None:
    into = request.into
    if into.dtype != torch.uint8 or into.ndim != 1 or not into.is_contiguous():
        raise InputError(f"into must be a contiguous uint8 vector, got {into.dtype} {list(into.shape)}")
    if request.ranges is None:
        return
    end = 0
    for offset, length in request.ranges:
        if offset < end or length < 0:
            raise InputError(f"ranges must ascend and not overlap, got {request.ranges}")
        end = offset + length
    if sum(length for _, length in request.ranges) != into.numel():
        raise InputError(f"into must be as long as the ranges together, got {into.numel()} bytes for {request.ranges}")


def _fetch(journal: Journal, at: tuple[int, ...], request: ReadRequest) -> Fetch | None:
    """The fetch of a request from a row of `FIELDS`; None when the record has not what is asked for."""
    sequence, number, block, size, _, _, _, _, header_blocks, extent, _ = at
    ranges = request.ranges
    if ranges is None:
        if request.into.numel() != size:
            return None
        ranges = whole(size)
    elif any(sum(part) > size for part in ranges):
        return None
    segment = journal.pool.segments[number]
    return Fetch(
        key=request.key,
        sequence=sequence,
        segment=segment,
        epoch=segment.epoch,
        offset=block * BLOCK_BYTES,
        header_bytes=header_blocks * BLOCK_BYTES,
        payload_bytes=size,
        extent_bytes=1 << extent,
        ranges=ranges,
        into=request.into,
    )


def pin_rows(catalog: Catalog, pool: SegmentPool, rows: IndexArray) -> list[Segment]:
    """Keep the segments of rows from being given back; the caller holds the catalogue's lock."""
    numbers = set(catalog.table.at["segment"][rows[rows >= 0]].tolist())
    pinned = [pool.segments[number] for number in numbers]
    for segment in pinned:
        segment.pins += 1
    return pinned


def unpin(catalog: Catalog, pinned: Sequence[Segment]) -> None:
    """Let segments go."""
    with catalog.lock:
        for segment in pinned:
            segment.pins -= 1
        catalog.drained.notify_all()


def put_aside(journal: Journal, fetches: Sequence[Fetch | None], outcomes: Sequence[Found | None]) -> None:
    """Take out records that are damaged or that the medium does not give: they are never served again."""
    counters = journal.catalog.counters
    for fetch, outcome in zip(fetches, outcomes, strict=True):
        if fetch is None or outcome is Found.RIGHT:
            continue
        with journal.catalog.lock:
            if outcome is Found.DAMAGED:
                counters.damaged += 1
            else:
                counters.failed += 1
            if fetch.error is None or fetch.error.errno != errno.ENOMEM:  # which says nothing about the medium
                journal.headers.forget(fetch.place)
                journal.catalog.put_aside(fetch.key, fetch.sequence)


def _count(
    journal: Journal, requests: Sequence[ReadRequest], outcomes: Sequence[Found | None], rows: IndexArray
) -> None:
    """Count hits and misses."""
    catalog = journal.catalog
    right = [at for at, outcome in enumerate(outcomes) if outcome is Found.RIGHT]
    served = rows if len(right) == len(rows) else rows[right]
    with catalog.lock:
        counters = catalog.counters
        counters.hits += len(right)
        counters.misses += len(outcomes) - len(right)
        counters.read_bytes += sum([requests[at].into.numel() for at in right])
        if served.size:
            at = catalog.table.at
            at["hits"][served] = np.minimum(at["hits"][served], 0xFFFFFFFE) + np.uint32(1)
            at["touched"][served] = 1
