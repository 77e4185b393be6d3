"""What a store did and holds, as one frozen value, and the counters behind it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from kvtier.storage_backends.records import RecordStats

__all__ = ["Counters", "PutReport", "RateReport", "StoreStats"]


class PutReport(NamedTuple):
    """What became of the chunks of one put.

    ``stored`` are new, ``existing`` were there, ``refused`` were not taken, and ``reason`` says why. ``volatile`` of
    the stored ones were refused by the tier on disk: they last as long as host memory keeps them.
    """

    stored: int = 0
    existing: int = 0
    refused: int = 0
    reason: str = ""
    volatile: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RateReport:
    """How fast a tier was found to serve: seconds of latency, bytes per second, reads that it was learnt from."""

    latency: float
    bandwidth: float
    reads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Counters since the store was opened, and bytes now.

    Attributes
    ----------
    tiers : dict of str to RecordStats
        Each tier by its name, the fastest first.
    rates : dict of str to RateReport
        What load-worthiness is predicted from.
    tenants : dict of str to int
        Live bytes of each tenant in the lowest tier.
    records : int
        Chunks that can be read.
    matches, hits : int
        Calls of `Namespace.match`; those that found a chunk.
    requested_tokens, matched_tokens : int
        Tokens in full chunks that were looked for, and found.
    loaded_tokens, loaded_bytes, load_seconds
        What `Hit.load` brought, and how long it took, summed over calls.
    short_loads : int
        Loads that brought less than they were asked for: something was damaged or gone.
    decisions, declined : int
        Matches that weighed loading against computing again; those that left stored chunks unused.
    transfer_seconds, recompute_seconds : float
        Predicted by these decisions, summed: what loading takes, what computing would take.
    stored_chunks, existing_chunks, refused_chunks, volatile_chunks : int
        As in `PutReport`, summed.
    promoted_bytes : int
        Copied from lower tiers into higher ones by reads.
    queued_bytes : int
        Waiting to be put in the background now.
    dropped_chunks : int
        Not put in the background because too much was waiting.
    last_refusal : str
        The newest reason of a refusal.
    """

    tiers: dict[str, RecordStats]
    rates: dict[str, RateReport]
    tenants: dict[str, int]
    records: int = 0
    matches: int = 0
    hits: int = 0
    requested_tokens: int = 0
    matched_tokens: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    short_loads: int = 0
    decisions: int = 0
    declined: int = 0
    transfer_seconds: float = 0.0
    recompute_seconds: float = 0.0
    stored_chunks: int = 0
    existing_chunks: int = 0
    refused_chunks: int = 0
    volatile_chunks: int = 0
    promoted_bytes: int = 0
    queued_bytes: int = 0
    dropped_chunks: int = 0
    last_refusal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


@dataclass(slots=True)
class Counters:
    """Sums under a lock; the names are those of `StoreStats`."""

    last_refusal: str = ""
    _sums: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **more: float) -> None:
        """Add to sums by name."""
        with self._lock:
            for name, value in more.items():
                self._sums[name] += value  # type: ignore[assignment]  # seconds are floats

    def add_put(self, report: PutReport) -> None:
        """Add a report."""
        with self._lock:
            for name in ("stored", "existing", "refused", "volatile"):
                self._sums[f"{name}_chunks"] += getattr(report, name)
            self.last_refusal = report.reason or self.last_refusal

    def sums(self) -> dict[str, Any]:
        """Every sum by name, consistent with each other."""
        with self._lock:
            return dict(self._sums) | {"last_refusal": self.last_refusal}
