"""Settings of a directory with a file for each record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtier.errors import ConfigError
from kvtier.record import BLOCK_BYTES, DEFAULT_EXTENT_BYTES, MAX_EXTENT_BYTES
from kvtier.types import format_bytes

__all__ = ["FileOptions"]

_LEAST_CAPACITY = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """Settings of a directory with a file for each record.

    Parameters
    ----------
    capacity : int
        Bytes; the hard bound on everything in the directory, whichever process put it there. Processes that give
        different capacities each keep to their own.
    durability : "durable" | "relaxed"
        Durable: a record that was put survives a power loss. Relaxed: not before `FileRecords.flush`, or until the
        system wrote it back by itself.
    extent_bytes : int
        Unit of digests and of reads.
    """

    capacity: int
    durability: Literal["durable", "relaxed"] = "durable"
    extent_bytes: int = DEFAULT_EXTENT_BYTES

    def __post_init__(self) -> None:
        if self.durability not in ("durable", "relaxed"):
            raise ConfigError(f'durability must be "durable" or "relaxed", got {self.durability!r}')
        if self.capacity < _LEAST_CAPACITY:
            raise ConfigError(
                f"required a capacity of at least {format_bytes(_LEAST_CAPACITY)}, got {format_bytes(self.capacity)}"
            )
        extent = self.extent_bytes
        if not BLOCK_BYTES <= extent <= MAX_EXTENT_BYTES or extent & (extent - 1):
            raise ConfigError(f"extent_bytes must be a power of two from 4096 to {MAX_EXTENT_BYTES}, got {extent}")

    @property
    def quarantine_bytes(self) -> int:
        """Most bytes of damaged files that are kept to be looked at."""
        return self.capacity // 16

    @classmethod
    def capacity_for(cls, held: int) -> int:
        """A capacity that a directory of so many bytes does not reach: nothing is evicted by looking at it."""
        return 2 * held + 4 * _LEAST_CAPACITY
