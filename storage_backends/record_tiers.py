"""Record stores by the name of their backend, opened from the settings of a tier; what `kvtier.registry` leads to."""

from __future__ import annotations

from kvtier.config import StoreConfig, TierConfig
from kvtier.errors import ConfigError
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords

__all__ = ["open_host", "open_segment"]


def open_host(tier: TierConfig, store: StoreConfig) -> HostRecords:
    """Records in memory, a part of which live sessions may borrow."""
    del store
    return HostRecords(tier.capacity, lendable_bytes=tier.capacity // 2 if tier.sessions is None else tier.sessions)


def open_segment(tier: TierConfig, store: StoreConfig) -> SegmentRecords:
    """Records in segment files."""
    if tier.path is None:
        raise ConfigError("a segment tier needs path, the directory of its segments")
    options = SegmentOptions(capacity=tier.capacity, segment_bytes=tier.segment_bytes, durability=store.durability)
    return SegmentRecords(tier.path, options, read_only=store.read_only)
