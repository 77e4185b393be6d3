"""Record stores by the name of their backend, opened from the settings of a tier; what `kvtier.registry` leads to."""

from __future__ import annotations

from pathlib import Path

from kvtier.config import StoreConfig, TierConfig
from kvtier.errors import ConfigError
from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords

__all__ = ["open_files", "open_host", "open_segment"]


def open_host(tier: TierConfig, store: StoreConfig) -> HostRecords:
    """Records in memory, a part of which live sessions may borrow."""
    del store
    return HostRecords(tier.capacity, lendable_bytes=tier.capacity // 2 if tier.sessions is None else tier.sessions)


def open_segment(tier: TierConfig, store: StoreConfig) -> SegmentRecords:
    """Records in segment files."""
    options = SegmentOptions(capacity=tier.capacity, segment_bytes=tier.segment_bytes, durability=store.durability)
    return SegmentRecords(_directory(tier), options, read_only=store.read_only)


def open_files(tier: TierConfig, store: StoreConfig) -> FileRecords:
    """Records in files of their own."""
    options = FileOptions(capacity=tier.capacity, durability=store.durability)
    return FileRecords(_directory(tier), options, read_only=store.read_only)


def _directory(tier: TierConfig) -> Path:
    if tier.path is None:
        raise ConfigError(f"a {tier.backend} tier needs path, its directory")
    return tier.path
