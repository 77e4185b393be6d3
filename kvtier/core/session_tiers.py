"""Where live sessions put pages that leave the device: tiers of their own, or a share of an open store's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from kvtier.config import StoreConfig, TierConfig
from kvtier.errors import ConfigError, StorageError
from kvtier.registry import storage_backends
from kvtier.storage_backends.base import SlotBackend
from kvtier.storage_backends.wrappers import VerifiedSlots
from kvtier.types import TierName, format_bytes

__all__ = ["ConfiguredTiers", "SessionTiers", "check_tenant", "slots_within"]


class SessionTiers(ABC):
    """Slot backends for the sessions of one memory.

    Attributes
    ----------
    capacities : mapping of TierName to int
        Bytes that sessions may take of each tier, fastest first.
    """

    capacities: Mapping[TierName, int]

    @abstractmethod
    def open(self, tier: TierName, slot_bytes: int, capacity: int) -> SlotBackend:
        """Slots of one size within ``capacity`` bytes of a tier; the caller closes them.

        Raises
        ------
        ConfigError
            A capacity that holds no slot.
        StorageError
            The tier cannot be opened.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the share back, once every backend is closed; idempotent."""


class ConfiguredTiers(SessionTiers):
    """Tiers that belong to one memory alone, as a configuration names them.

    Parameters
    ----------
    config : StoreConfig
        Tiers whose backends hold slots: ``"host"`` and ``"spill"``, or installed ones.
    tenant : str
        Files go into a directory of its name.
    """

    def __init__(self, config: StoreConfig, tenant: str) -> None:
        self.capacities = {tier.name: tier.capacity for tier in config.tiers}
        self._tiers: dict[TierName, TierConfig] = {tier.name: tier for tier in config.tiers}
        self._tenant = check_tenant(tenant)

    def open(self, tier: TierName, slot_bytes: int, capacity: int) -> SlotBackend:
        """Slots in memory, or verified slots in a file."""
        settings = self._tiers[tier]
        kind = storage_backends.resolve(settings.backend)
        slots = slots_within(kind, tier, slot_bytes, capacity)
        if settings.path is None:
            backend: SlotBackend = kind(slot_bytes, slots)
            return backend
        return VerifiedSlots(kind(slot_bytes, slots, _tenant_directory(settings, settings.path, self._tenant)))

    def close(self) -> None:
        """Nothing is shared."""


def slots_within(kind: type[SlotBackend], tier: TierName, slot_bytes: int, capacity: int) -> int:
    """Most slots of a backend within a capacity; `ConfigError` when there is none."""
    slots = kind.slots_within(slot_bytes, capacity)
    if slots < 1:
        raise ConfigError(
            f"the {tier} tier must hold at least one page ({format_bytes(slot_bytes)}), "
            f"got {format_bytes(capacity)} for it"
        )
    return slots


def check_tenant(tenant: str) -> str:
    """A tenant's name, which is also that of a directory; `ConfigError` when it cannot be."""
    if not tenant or not all(part.isalnum() or part in "-_." for part in tenant) or tenant.startswith("."):
        raise ConfigError(f"tenant must be letters, digits, '-', '_' or '.', got {tenant!r}")
    return tenant


def _tenant_directory(tier: TierConfig, path: Path, tenant: str) -> Path:
    """The tenant's own directory under ``path``, which must exist."""
    if not path.is_dir():
        raise StorageError(
            f"the {tier.name} tier needs an existing directory, got {path}; create it or choose another path"
        )
    directory = path / tenant
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create {directory} for the {tier.name} tier: {error.strerror}; choose a writable path"
        ) from error
    return directory
