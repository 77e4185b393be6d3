"""A directory of records in files, and ways to look behind the store's back."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.storage_backends.engines.kernel_queue import QueuePool
from kvtier.storage_backends.files import FileOptions, FileRecords

CAPACITY = 4 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transfer is a call of ``os`` that a test can replace, none goes through a queue of the kernel."""
    monkeypatch.setattr(QueuePool, "take", lambda pool: None)


@pytest.fixture
def open_store(directory: Path) -> Callable[..., FileRecords]:
    """Opens the directory; keywords go to `FileOptions`."""

    def opened(*, read_only: bool = False, capacity: int = CAPACITY, **options: object) -> FileRecords:
        settings = FileOptions(capacity=capacity, **options)  # type: ignore[arg-type]
        return FileRecords(directory, settings, read_only=read_only)

    return opened
