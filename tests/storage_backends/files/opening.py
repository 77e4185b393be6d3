"""How the tests of crashes open a store in their worker processes: ``opening.py:durable``, ``opening.py:relaxed``."""

from pathlib import Path

from kvtier.storage_backends.files import FileOptions, FileRecords

__all__ = ["durable", "relaxed"]


def durable(directory: Path, capacity_bytes: int) -> FileRecords:
    """Puts survive a power loss."""
    return FileRecords(directory, FileOptions(capacity=capacity_bytes))


def relaxed(directory: Path, capacity_bytes: int) -> FileRecords:
    """Puts survive a power loss once they were flushed."""
    return FileRecords(directory, FileOptions(capacity=capacity_bytes, durability="relaxed"))
