"""I/O engines: how bytes get between files and tensors."""

from kvtier.storage_backends.engines.base import EngineCapabilities, EngineFile, IOEngine, Transfer

__all__ = ["EngineCapabilities", "EngineFile", "IOEngine", "Transfer"]
