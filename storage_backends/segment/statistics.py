"""The counters of a segment store, added up."""

from __future__ import annotations

from dataclasses import asdict

from kvtier.record import SUPERBLOCK_BYTES, SegmentKind
from kvtier.storage_backends.records import RecordStats
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.pool import SegmentPool

__all__ = ["collect_stats"]


def collect_stats(
    catalog: Catalog, pool: SegmentPool, held_bytes: int, capacity_bytes: int, degraded: str
) -> RecordStats:
    """What `RecordStats` says, consistent with itself."""
    with catalog.lock:
        live = sum(catalog.live_bytes.values())
        cache = [segment for segment in list(pool.segments.values()) if segment.kind is SegmentKind.CACHE]
        written = sum(segment.cursor - SUPERBLOCK_BYTES for segment in cache)
        tenants = {
            catalog.tenants.values[number].decode(): size for number, size in catalog.tenant_bytes.items() if size
        }
        return RecordStats(
            records=catalog.table.count,
            live_bytes=live,
            dead_bytes=max(0, written - live),
            held_bytes=held_bytes,
            capacity_bytes=capacity_bytes,
            leased_bytes=catalog.leased_bytes(),
            degraded=degraded,
            tenants=tenants,
            **asdict(catalog.counters),
        )
