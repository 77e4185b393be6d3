"""Mooncake's store with SSD offload: a master and a client on the loopback, the copy in DRAM dropped before reads.

`put` answers as soon as the pieces are in DRAM; the copy on the SSD follows with the client's next heartbeat, once a
second. So a write is waited for and not timed; a read, with nothing but that copy left, is timed. Its checksum stays
off, as released.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

_ROOM: Final = 256 << 20
_PATIENCE_SECONDS: Final = 30.0


class Store:
    """A client that gives DRAM for all pieces, the offset allocator on the SSD, io_uring."""

    untimed_put = "put answers from DRAM; the SSD follows with the next heartbeat, 1 s"

    def __init__(self, directory: Path, *, piece_bytes: int, pieces: int, direct: bool, durable: bool) -> None:
        del direct  # it has no switch
        size = pieces * piece_bytes
        self.note = "offset allocator, io_uring, TCP on the loopback" + (", strict persistence" if durable else "")
        os.environ.update(
            MOONCAKE_OFFLOAD_FILE_STORAGE_PATH=str(directory),
            MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR="offset_allocator_storage_backend",
            MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS="1",
            MOONCAKE_OFFLOAD_USE_URING="1",
            MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES=str(_ROOM),
            MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES=str(2 * size + _ROOM),
            MOONCAKE_OFFSET_PERSIST_MODE="strict" if durable else "relaxed",
        )
        from mooncake.store import MooncakeDistributedStore

        port = _free_port()
        self._master = _master(port)
        self._client = MooncakeDistributedStore()
        self._registered: set[int] = set()
        place = str(directory)
        failed = self._client.setup(
            "127.0.0.1", "P2PHANDSHAKE", 2 * size + _ROOM, _ROOM, "tcp", "", f"127.0.0.1:{port}", None, True, place
        )
        if failed:
            raise RuntimeError(f"setup answered {failed}")

    def batch(self, names: Sequence[str], buffers: Sequence[Any]) -> Any:
        """Keys, addresses and sizes of registered buffers."""
        for buffer in buffers:
            if buffer.ctypes.data not in self._registered:
                self._client.register_buffer(buffer.ctypes.data, buffer.nbytes)
                self._registered.add(buffer.ctypes.data)
        return list(names), [buffer.ctypes.data for buffer in buffers], [buffer.nbytes for buffer in buffers]

    def put(self, batch: Any) -> None:
        """Put, wait for the SSD, and drop the copy in DRAM."""
        keys = batch[0]
        if any(self._client.batch_put_from(*batch)):
            raise RuntimeError("put refused a piece")
        until = time.monotonic() + _PATIENCE_SECONDS
        while not self._all_on_disk(keys):
            if time.monotonic() > until:
                raise RuntimeError(f"not on the SSD after {_PATIENCE_SECONDS:.0f} s")
            time.sleep(0.02)
        self._client.batch_replica_clear(keys, self._client.get_hostname())

    def get(self, batch: Any) -> list[bool]:
        """Get into the buffers."""
        return [got == size for got, size in zip(self._client.batch_get_into(*batch), batch[2], strict=True)]

    def close(self) -> None:
        """Close the client, then end the master."""
        self._client.close()
        self._master.send_signal(signal.SIGKILL)
        self._master.wait()

    def _all_on_disk(self, keys: Sequence[str]) -> bool:
        found = self._client.batch_get_replica_desc(list(keys))
        return all(any(not one.is_memory_replica() for one in found.get(key, ())) for key in keys)


def _master(port: int) -> subprocess.Popen[bytes]:
    """Start one that listens on the loopback alone."""
    import mooncake

    binary = Path(mooncake.__file__).parent / "mooncake_master"
    words = [
        *(str(binary), f"--rpc_port={port}", "--rpc_address=127.0.0.1", "--enable_offload=true"),
        *(f"--metrics_port={_free_port()}", "--metrics_host=127.0.0.1", "--default_kv_lease_ttl=0", "--logtostderr"),
    ]
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    raise RuntimeError("mooncake_master does not answer")


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port
