"""What a law must leave as it found it: descriptors and threads of the process."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["NoLeaks"]


class NoLeaks:
    """Mix-in of law suites: after each law the process has no descriptor and no thread more than before."""

    @pytest.fixture(autouse=True)
    def no_leaks(self) -> Iterator[None]:
        """Count before, run, collect garbage, count again."""
        before = _open_files(), set(threading.enumerate())
        yield
        gc.collect()
        left = [thread.name for thread in set(threading.enumerate()) - before[1] if thread.is_alive()]
        assert not left, f"threads still run: {left}"
        assert _open_files() == before[0], "a descriptor was left open, or one too many closed"


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
