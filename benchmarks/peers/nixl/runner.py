"""NIXL's POSIX plugin: moves lists of bytes between memory and a file; it has no index, no sync and no checksum.

Where a piece lies is known to the caller alone: here, in the order of their numbers, with no header between them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nixl_cu12._api import nixl_agent, nixl_agent_config
from nixl_cu12._bindings import nixlBackendError


class Store:
    """One preallocated file and one transfer a call; ``durable`` adds a fdatasync."""

    def __init__(
        self, directory: Path, *, piece_bytes: int, pieces: int, direct: bool, durable: bool, queue: str = "aio"
    ) -> None:
        self.note = queue + (", and a fdatasync a call by the benchmark" if durable else "")
        self._size, self._durable = piece_bytes, durable
        path = directory / "nixl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o644)
        if os.fstat(self._file).st_size == 0:
            os.posix_fallocate(self._file, 0, piece_bytes * pieces)
        self._agent = nixl_agent("store", nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", {f"use_{queue}": "true"})
        self._registered = [
            self._agent.register_memory([(0, piece_bytes * pieces, self._file, "")], "FILE", backends=["POSIX"])
        ]

    def batch(self, names: Sequence[str], buffers: Sequence[Any]) -> Any:
        """Places in memory, registered, and in the file."""
        memory = [(buffer.ctypes.data, self._size, 0) for buffer in buffers]
        places = [(int(name.rpartition("-")[2]) * self._size, self._size, self._file) for name in names]
        self._registered.append(self._agent.register_memory([(*one, "") for one in memory], "DRAM", backends=["POSIX"]))
        return memory, places

    def put(self, batch: Any) -> None:
        """Write them all."""
        if not self._moved("WRITE", batch):
            raise RuntimeError("NIXL reported ERR")
        if self._durable:
            os.fdatasync(self._file)

    def get(self, batch: Any) -> list[bool]:
        """Read them all."""
        return [self._moved("READ", batch)] * len(batch[0])

    def close(self) -> None:
        """Deregister and close."""
        for one in self._registered:
            self._agent.deregister_memory(one, backends=["POSIX"])
        os.close(self._file)

    def _moved(self, way: str, batch: Any) -> bool:
        memory, places = self._agent.get_xfer_descs(batch[0], "DRAM"), self._agent.get_xfer_descs(batch[1], "FILE")
        handle = self._agent.initialize_xfer(way, memory, places, "store", backends=["POSIX"])
        try:
            state = self._agent.transfer(handle)
            while state == "PROC":
                time.sleep(0)
                state = self._agent.check_xfer_state(handle)
        except nixlBackendError:
            return False
        finally:
            self._agent.release_xfer_handle(handle)
        return state == "DONE"
