"""LMCache's C++ file backend (`fs_native`): one file a piece, worker threads, no sync, no checksum."""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lmcache.lmcache_fs import LMCacheFSClient


class Store:
    """Its native client; ``durable`` adds one syncfs a call, the cheapest way to make all its files durable."""

    def __init__(
        self, directory: Path, *, piece_bytes: int, pieces: int, direct: bool, durable: bool, workers: int = 4
    ) -> None:
        del piece_bytes, pieces
        self.note = f"{workers} workers" + (", and a syncfs a call by the benchmark" if durable else "")
        self._client = LMCacheFSClient(str(directory), workers, "", direct, 0)
        self._directory = os.open(directory, os.O_RDONLY) if durable else None

    def batch(self, names: Sequence[str], buffers: Sequence[Any]) -> Any:
        """Names in the form of its keys, and views."""
        keys = [f"model@00000000@0@{sha256(name.encode()).hexdigest()}" for name in names]
        return keys, [memoryview(buffer) for buffer in buffers]

    def put(self, batch: Any) -> None:
        """One batch set."""
        ok, error, _ = self._wait(self._client.submit_batch_set(*batch))
        if not ok:
            raise RuntimeError(error)
        if self._directory is not None and ctypes.CDLL(None, use_errno=True).syncfs(self._directory):
            raise OSError(ctypes.get_errno(), "syncfs")

    def get(self, batch: Any) -> list[bool]:
        """One batch get."""
        ok, _, each = self._wait(self._client.submit_batch_get(*batch))
        return [bool(one) for one in each] if each else [bool(ok)] * len(batch[0])

    def close(self) -> None:
        """Stop the workers."""
        self._client.close()
        if self._directory is not None:
            os.close(self._directory)

    def _wait(self, future: int) -> tuple[bool, str, list[bool] | None]:
        while True:
            select.select([self._client.event_fd()], [], [])
            os.eventfd_read(self._client.event_fd())
            for done, ok, error, each in self._client.drain_completions():
                if done == future:
                    return ok, error, each
