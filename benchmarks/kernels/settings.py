"""How large and how often: the measurement proper, and the quick one that only shows that it runs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Final

import torch

from benchmarks.machine import last_level_cache_bytes
from benchmarks.timing import Limits
from kvtier.types import DTypeName

__all__ = ["Settings", "settings_of"]

_QUICK_CONTEXT: Final = 2048
_DTYPES: Final[dict[str, tuple[DTypeName, ...]]] = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "float32")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run.

    Parameters
    ----------
    device : str
        ``"cpu"`` or ``"cuda"``.
    operators : tuple of str, optional
        Folders below kernels/, and ``"quest"``; None for all.
    stream_bytes, flush_bytes : int
        Size of the read stream, and what is read between two timings to empty the caches.
    """

    device: str
    contexts: tuple[int, ...]
    dtypes: tuple[DTypeName, ...]
    operators: tuple[str, ...] | None
    limits: Limits
    stream_bytes: int
    flush_bytes: int
    seed: int = 0

    def wants(self, operator: str) -> bool:
        """Whether an operator was asked for."""
        return self.operators is None or operator in self.operators


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the command line asks for."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cache = last_level_cache_bytes() if device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size
    chosen = Settings(
        device=device,
        contexts=(_QUICK_CONTEXT,) if options.quick else (32768, 131072),
        dtypes=_DTYPES[device],
        operators=options.operators,
        limits=Limits(seconds=0.2, least=3, most=5, warm_up=1)
        if options.quick
        else Limits(seconds=15.0, least=9, most=200, warm_up=3),
        stream_bytes=32 << 20 if options.quick else 16 * cache,
        flush_bytes=8 << 20 if options.quick else 4 * cache,
    )
    for name in ("contexts", "dtypes"):
        if getattr(options, name) is not None:
            chosen = replace(chosen, **{name: getattr(options, name)})
    return chosen
