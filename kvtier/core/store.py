"""The store: prefixes of KV cache over ordered tiers, for the next request, the next process and the next day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvtier.config import StoreConfig, TenantConfig, TierConfig, load_config
from kvtier.core.namespace import Namespace
from kvtier.core.prefix import Identity, namespace_digest
from kvtier.core.publisher import Publisher
from kvtier.core.session_tiers import SessionTiers
from kvtier.core.staging import Staging
from kvtier.core.store_stats import Counters, RateReport, StoreStats
from kvtier.core.store_tiers import HostShare, StoreTiers
from kvtier.errors import ConfigError
from kvtier.registry import record_stores
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.quota_records import QuotaRecords
from kvtier.storage_backends.rates import TransferRate
from kvtier.storage_backends.record_wrappers import ReadOnlyRecords
from kvtier.storage_backends.records import MAX_TENANT_BYTES, RecordStats, RecordStore
from kvtier.storage_backends.segment import SegmentRecords
from kvtier.storage_backends.slots import IntArray
from kvtier.storage_backends.tiered_records import TieredRecords
from kvtier.storage_backends.workers import Workers
from kvtier.types import KVLayout

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Store", "open_store"]

_FIRST_GUESS = {"host": (20e-6, 4e9), "nvme": (200e-6, 1e9)}
"""Latency in seconds and bytes per second, until reads say better."""

_FIRST_DECODING = 4e9


def open_store(
    config: StoreConfig | Mapping[str, Any] | str | Path | None = None, *, read_only: bool | None = None
) -> Store:
    """Open the tiers of a configuration; close them with `Store.close` or a ``with`` block.

    Parameters
    ----------
    config : StoreConfig, dict or path of a TOML file, optional
        By default half of the memory that is free now.
    read_only : bool, optional
        Change nothing on disk; overrides the configuration.

    Raises
    ------
    ConfigError
        For a configuration that is wrong.
    StorageError
        When a tier cannot be opened, as when another process has its directory; nothing is left open.
    """
    settings = load_config(config)
    if read_only is not None:
        settings = settings.model_copy(update={"read_only": read_only})
    return Store(settings)


class Store:
    """Prefixes of KV cache, verified when they are read, over tiers of bounded size.

    Attributes
    ----------
    config : StoreConfig
        What it was opened with.
    records : RecordStore
        The bytes beneath: all tiers as one.
    rates : tuple of TransferRate
        How fast each tier was found to serve.
    decoding : TransferRate
        How fast payloads become tensors.
    workers : Workers
        Decode chunks from where they lie in memory.
    staging : Staging
        Buffers that records pass through.

    Notes
    -----
    Any thread may call anything. What a medium does is never an exception here: a damaged, lost or slow record is a
    miss, what cannot be stored is refused, and `stats` tells.
    """

    def __init__(self, config: StoreConfig) -> None:
        if not config.tiers:
            raise ConfigError("a store needs at least one tier, got none; name a host tier, an nvme tier or both")
        self.config = config
        self.counters = Counters()
        self.staging = Staging()
        self.workers = Workers()
        self.decoding = TransferRate(latency=0.0, bandwidth=_FIRST_DECODING)
        quotas = {name: tenant.quota for name, tenant in config.tenants.items() if tenant.quota is not None}
        with ExitStack() as undo:
            self.tiers: list[RecordStore] = []
            opened: list[RecordStore] = []
            self._host_share: HostShare | None = None
            self._segments: SegmentRecords | None = None
            for tier in config.tiers:
                records = undo.enter_context(_open_tier(tier, config))
                opened.append(records)
                if isinstance(records, HostRecords):
                    self._host_share = HostShare(records)
                elif isinstance(records, SegmentRecords) and not config.read_only:
                    self._segments = records
                self.tiers.append(QuotaRecords(records, quotas) if quotas else records)
            undo.pop_all()
        self.rates = tuple(map(_first_guess, config.tiers, opened))
        self._tiered = TieredRecords(self.tiers, self.rates)
        self.records: RecordStore = ReadOnlyRecords(self._tiered) if config.read_only else self._tiered
        self.publisher = Publisher(config.publish_bytes, self.counters)

    def namespace(
        self, *, model: Identity, layout: KVLayout, tenant: str = "default", extra: Identity = None
    ) -> Namespace:
        """The place of one model's prefixes.

        Parameters
        ----------
        model : Identity
            What tells this model's keys and values from any other's: ``kvtier.fingerprint(model)``, or text, bytes,
            numbers, sequences and mappings of your own.
        layout : KVLayout
            Shape of its KV cache; ``chunk_tokens`` of the configuration overrides the layout's.
        tenant : str
            Whose data this is: nothing is shared between tenants with different salts.
        extra : Identity
            What else changes keys and values: adapter, image digests.

        Raises
        ------
        ConfigError
            A tenant whose name is empty or too long, or ``chunk_tokens`` that does not fit the layout.
        """
        if not 0 < len(tenant.encode()) <= MAX_TENANT_BYTES:
            raise ConfigError(f"tenant must be 1 to {MAX_TENANT_BYTES} bytes in UTF-8, got {tenant!r}")
        if self.config.chunk_tokens is not None:
            layout = replace(layout, chunk_tokens=self.config.chunk_tokens)
        salt = self.config.tenants.get(tenant, TenantConfig()).salt
        digest = namespace_digest(
            model=model,
            layout=layout,
            salt=f"name:{tenant}".encode() if salt is None else f"salt:{salt}".encode(),
            extra=extra,
        )
        return Namespace(self, layout, tenant, digest)

    def session_tiers(self, *, host_bytes: int | None = None) -> SessionTiers:
        """A share of the tiers for the sessions of one `Memory`, which gives it back when it is closed.

        The host tier lends ``sessions`` bytes, half of it by default, and keeps the stored copies that were used last.
        An nvme tier of segments is shared as it is used; other backends are not shared.

        Parameters
        ----------
        host_bytes : int, optional
            Part of that share; by default all that no other memory took.

        Raises
        ------
        ConfigError
            The share is taken.
        CapacityError
            Hits that are not released hold the memory.
        """
        return StoreTiers(self._host_share, host_bytes, self._segments)

    def clear(self, tenant: str | None = None) -> int:
        """Forget everything of a tenant, or everything; how many chunks there were."""
        return self.records.clear(tenant)

    def locate(self, keys: Sequence[bytes]) -> IntArray:
        """The fastest tier that has each key, int64 [n] into ``config.tiers``; -1 where none has."""
        return self._tiered.locate(keys)

    def stats(self) -> StoreStats:
        """Counters since the store was opened, and bytes now."""
        tiers: dict[str, RecordStats] = {
            tier.name: records.stats() for tier, records in zip(self.config.tiers, self.tiers, strict=True)
        }
        rates: dict[str, RateReport] = {
            tier.name: RateReport(latency=rate.latency, bandwidth=rate.bandwidth, reads=rate.transfers)
            for tier, rate in zip(self.config.tiers, self.rates, strict=True)
        }
        return StoreStats(
            tiers=tiers,
            rates=rates,
            tenants=tiers[self.config.tiers[-1].name].tenants,
            records=self.records.stats().records,
            queued_bytes=self.publisher.queued_bytes,
            promoted_bytes=self._tiered.promoted_bytes,
            **self.counters.sums(),
        )

    def flush(self) -> None:
        """Wait for `Namespace.publish`, then make all that was put survive a power loss, as far as tiers can."""
        self.publisher.flush()
        self.records.flush()

    def close(self) -> None:
        """Flush and let go of the tiers; idempotent. Later puts are refused, later matches find nothing."""
        self.publisher.close()
        self.records.close()
        self.staging.close()
        self.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_tier(tier: TierConfig, config: StoreConfig) -> RecordStore:
    if tier.backend == "spill":
        raise ConfigError("the spill backend holds live sessions only; name backend 'segment' or 'files' for a store")
    records: RecordStore = record_stores.resolve(tier.backend)(tier, config)
    return records


def _first_guess(tier: TierConfig, records: RecordStore) -> TransferRate:
    """What the drive was measured to be when it was opened, where it was; else what is usual."""
    latency, bandwidth = _FIRST_GUESS[tier.name]
    if isinstance(records, SegmentRecords) and records.drive.bandwidth > 0:
        latency, bandwidth = records.drive.latency, records.drive.bandwidth
    return TransferRate(latency=latency, bandwidth=bandwidth)
