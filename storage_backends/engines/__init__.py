"""I/O engines: how bytes get between files and tensors.

`choose_engine`   the engine for this machine, by name or by itself
`PosixEngine`     a queue of the kernel for direct transfers, preadv and pwritev in threads for others; the default
`KvikioEngine`    GPUDirect Storage where there is one, by NVIDIA's kvikio

io_uring is left out: containers often forbid it, and the older queue (``io_submit``) takes away what cost most, a
thread to wake for each transfer.
"""

from kvtier.storage_backends.engines.base import EngineCapabilities, EngineFile, IOEngine, Transfer, host_bytes
from kvtier.storage_backends.engines.choose import ENGINES, choose_engine
from kvtier.storage_backends.engines.kvikio import KvikioEngine
from kvtier.storage_backends.engines.posix import PosixEngine

__all__ = [
    "ENGINES",
    "EngineCapabilities",
    "EngineFile",
    "IOEngine",
    "KvikioEngine",
    "PosixEngine",
    "Transfer",
    "choose_engine",
    "host_bytes",
]
