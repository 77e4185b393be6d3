"""Record stores by the name of their backend, opened from the settings of a tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.storage_backends.host_records import HostRecords

if TYPE_CHECKING:
    from kvtier.config import StoreConfig, TierConfig
    from kvtier.storage_backends.records import RecordStore

__all__ = ["open_files", "open_host", "open_segment"]


def open_host(tier: TierConfig, store: StoreConfig) -> RecordStore:
    """Records in memory."""
    del store
    return HostRecords(tier.capacity)


def open_segment(tier: TierConfig, store: StoreConfig) -> RecordStore:
    """Records in segment files."""
    raise NotImplementedError


def open_files(tier: TierConfig, store: StoreConfig) -> RecordStore:
    """Records in files of their own."""
    raise NotImplementedError
