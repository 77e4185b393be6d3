"""I/O engines: how bytes get between files and tensors.

`PosixEngine`     preadv and pwritev in a pool of threads; the default everywhere
"""

from kvtier.storage_backends.engines.base import EngineCapabilities, EngineFile, IOEngine, Transfer
from kvtier.storage_backends.engines.posix import PosixEngine

__all__ = ["EngineCapabilities", "EngineFile", "IOEngine", "PosixEngine", "Transfer"]
