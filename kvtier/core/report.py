"""What a session or a memory holds, read and spent, as one frozen value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SessionReport", "TierReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierReport:
    """Bytes of one tier, counted at its allocations.

    Parameters
    ----------
    capacity : int, optional
        The bound; None when there is none.
    used : int
        Bytes that hold live KV, sketches or tails.
    allocated : int
        Bytes held from the system.
    peak : int
        The most that was ever used.
    """

    capacity: int | None
    used: int
    allocated: int
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionReport:
    """A session and the memory under it.

    Parameters
    ----------
    tokens : int
        Tokens seen per row, padding included.
    kept : int
        Most slots held in any layer of any row.
    pages_read, pages_held : int
        Pages read by decode steps per KV head, and pages there were to read, summed over layers and steps.
    seconds : dict of str to float
        Time in ``append`` and ``attend``.
    moved : dict of str to int
        Bytes written below the device, spilled from host to NVMe, read from below, promoted.
    """

    policy: str
    tenant: str
    lossless: bool
    rows: int
    tokens: int
    kept: int
    bytes: dict[str, TierReport]
    device_bytes: dict[str, int]
    moved: dict[str, int]
    pages_read: int
    pages_held: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)
