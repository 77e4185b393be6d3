"""I/O engines: how bytes get between files and tensors.

`choose_engine`   the engine for this machine, by name or by itself
`PosixEngine`     preadv and pwritev in a pool of threads; the default everywhere
`KvikioEngine`    GPUDirect Storage where there is one, by NVIDIA's kvikio

io_uring is left out: at these sizes it measured no faster than the pool of threads, and containers often forbid it.
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
