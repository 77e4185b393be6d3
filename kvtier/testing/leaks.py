"""What a law must leave as it found it: descriptors and threads of the process."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["NoLeaks"]

_PATIENCE_S = 2.0


class NoLeaks:
    """Mix-in of law suites: after each law the process has no descriptor and no thread more than before."""

    @pytest.fixture(autouse=True)
    def no_leaks(self) -> Iterator[None]:
        """Collect garbage, count, run, collect garbage, count again."""
        gc.collect()  # what tests before this one left is not this one's
        files, threads = _open_files(), set(threading.enumerate())
        yield
        gc.collect()
        left = [thread.name for thread in set(threading.enumerate()) - threads if thread.is_alive()]
        assert not left, f"threads still run: {left}"
        patience = time.monotonic() + _PATIENCE_S
        while len(now := _open_files()) != len(files) and time.monotonic() < patience:
            time.sleep(0.01)  # somebody else in the process may be at work; a leak stays
        opened, closed = set(now.items()) - set(files.items()), set(files.items()) - set(now.items())
        assert len(now) == len(files), f"descriptors were left open: {opened}; or closed once too often: {closed}"


def _open_files() -> dict[int, str]:
    """What each descriptor of the process stands for."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very listing is gone by now
            found[int(entry.name)] = str(entry.readlink())
    return found
