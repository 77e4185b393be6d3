"""What every record store counts since it was opened."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RecordCounts"]


@dataclass(slots=True)
class RecordCounts:
    """Counts under the names of `RecordStats`; whoever changes one holds the lock of the store."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    failed: int = 0
    evicted: int = 0
    refused: int = 0
    stored: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
