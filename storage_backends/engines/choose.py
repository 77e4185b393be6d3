"""Which engine: kvikio where it serves a GPU, POSIX everywhere else, and the reason."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch

from kvtier.errors import ConfigError, MissingDependencyError, StorageError
from kvtier.storage_backends.engines.base import IOEngine
from kvtier.storage_backends.engines.kvikio import KvikioEngine
from kvtier.storage_backends.engines.posix import DEFAULT_THREADS, PosixEngine

__all__ = ["ENGINES", "choose_engine"]

ENGINES = ("auto", "posix", "kvikio")
"""What `choose_engine` knows."""

_logger = logging.getLogger("kvtier.storage_backends.engines")


def choose_engine(name: str = "auto", *, threads: int = DEFAULT_THREADS, directory: Path | None = None) -> IOEngine:
    """Make the engine of that name; `IOEngine.capabilities` says which it became and why.

    Parameters
    ----------
    name : "auto" | "posix" | "kvikio"
        "auto" takes kvikio where there is a GPU and kvikio is installed: without a GPU it is no faster. Where kvikio
        does not work, the POSIX engine serves in its place.
    threads : int
        Most transfers under way at once for one call.
    directory : Path, optional
        Where kvikio is tried: best the file system that will be used.

    Raises
    ------
    ConfigError
        Another name.
    """
    if name not in ENGINES:
        raise ConfigError(f"unknown I/O engine {name!r}; known: {', '.join(ENGINES)}")
    if name == "posix":
        return PosixEngine(threads)
    if name == "auto" and (reason := _why_not_kvikio()):
        return PosixEngine(threads, note=reason)
    try:
        return KvikioEngine(threads, directory=directory)
    except (MissingDependencyError, StorageError) as error:
        _logger.warning("the posix engine serves in place of kvikio: %s", error)
        return PosixEngine(threads, note=f"in place of kvikio: {error}")


def _why_not_kvikio() -> str:
    """Why kvikio is not even tried; empty when it is worth it."""
    if not torch.cuda.is_available():
        return "no GPU that kvikio could serve"
    if importlib.util.find_spec("kvikio") is None:
        return "kvikio is not installed: files reach the GPU through host memory"
    return ""
