"""How large and how often: the measurement proper, and the quick one that only shows that it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from benchmarks.machine import available_bytes, last_level_cache_bytes
from benchmarks.timing import Limits
from benchmarks.workload import Shape
from kvtier.types import DTypeName, format_bytes

__all__ = ["LEAST_CONTEXT", "PARTS", "Settings", "most_that_fit", "refusal", "settings_of"]

PARTS: Final = ("attention", "step", "overhead")
LEAST_CONTEXT: Final = 2048
"""Tokens; a sixteenth of fewer is less than a policy's smallest budget."""

_GPU_CACHE: Final = 64 << 20
"""Bytes that the second-level cache of no GPU exceeds by much."""
_BLOCK: Final = Shape(dtype="float32").layout(1).block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run.

    Parameters
    ----------
    limits : Limits
        Rounds of a case of attention or of a step.
    overhead_limits, replay_limits : Limits
        Rounds of session overhead by the clock around kernels, a whole block so that one step seals; and by difference.
    data_sets_bytes : int
        Different random caches are taken in turn until they reach this size together, two at least.
    generated : int
        Tokens of the context that came after the prompt, one at a time.
    stream_bytes, flush_bytes : int
        Size of the read stream, and what is read between two timings to empty the caches.
    model_layers, hidden, intermediate : int
        Of the model whose whole step is timed; fewer layers where memory is short.
    overhead_context, overhead_layers, profile_steps : int
        Of the session whose overhead is measured and profiled.
    overhead_generated : tuple of int
        What ``generated`` is there, one row each: pages that decoding seals lie scattered.
    """

    device: str
    parts: tuple[str, ...]
    contexts: tuple[int, ...]
    dtypes: tuple[DTypeName, ...]
    limits: Limits
    overhead_limits: Limits
    replay_limits: Limits
    data_sets_bytes: int
    generated: int = 256
    stream_bytes: int
    flush_bytes: int
    model_layers: int = 2
    hidden: int
    intermediate: int
    overhead_context: int
    overhead_layers: int = 4
    overhead_generated: tuple[int, ...]
    profile_steps: int
    seed: int = 0


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the command line asks for."""
    chosen = _quick() if options.quick else _proper(last_level_cache_bytes())
    if options.device == "cuda":
        chosen = _on_a_gpu(chosen, quick=options.quick)
    for name in ("contexts", "dtypes", "generated", "parts"):
        if getattr(options, name) is not None:
            chosen = replace(chosen, **{name: getattr(options, name)})
    return chosen


def refusal(needed: int, device: str = "cpu") -> str | None:
    """Why a case that needs so many bytes is left out; None when they are there."""
    free = available_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
    return None if needed < free else f"needs {format_bytes(needed)} of memory, {format_bytes(free)} are free"


def most_that_fit(most: int, needed: Callable[[int], int], device: str = "cpu") -> int:
    """The greatest number up to ``most`` whose bytes, as ``needed`` says, are there; 1 at least."""
    return next((count for count in range(most, 1, -1) if refusal(needed(count), device) is None), 1)


def _on_a_gpu(settings: Settings, *, quick: bool) -> Settings:
    """The same on a GPU, whose caches are others; the overhead of the session is that of the host."""
    settings = replace(settings, device="cuda", parts=tuple(part for part in PARTS if part != "overhead"))
    if quick:
        return settings
    sizes = {"data_sets_bytes": 4 * _GPU_CACHE, "stream_bytes": 64 * _GPU_CACHE, "flush_bytes": 4 * _GPU_CACHE}
    return replace(settings, limits=Limits(seconds=2.0, least=7, most=60, warm_up=3), **sizes)


def _proper(cache: int) -> Settings:
    return Settings(
        device="cpu",
        parts=PARTS,
        contexts=(8192, 32768, 131072),
        dtypes=("float32", "bfloat16"),
        limits=Limits(seconds=15.0, least=7, most=60, warm_up=2),
        overhead_limits=Limits(seconds=0.0, least=_BLOCK, most=_BLOCK, warm_up=3),
        replay_limits=Limits(seconds=2.0, least=9, most=50, warm_up=2),
        data_sets_bytes=4 * cache,
        stream_bytes=16 * cache,
        flush_bytes=4 * cache,
        hidden=4096,
        intermediate=14336,
        overhead_context=32768,
        overhead_generated=(0, 256, 2048),
        profile_steps=30,
    )


def _quick() -> Settings:
    return Settings(
        device="cpu",
        parts=PARTS,
        contexts=(LEAST_CONTEXT,),
        dtypes=("float32", "bfloat16"),
        limits=Limits(seconds=0.2, least=3, most=5, warm_up=1),
        overhead_limits=Limits(seconds=0.2, least=3, most=5, warm_up=1),
        replay_limits=Limits(seconds=0.2, least=3, most=5, warm_up=1),
        data_sets_bytes=0,
        stream_bytes=32 << 20,
        flush_bytes=8 << 20,
        hidden=256,
        intermediate=512,
        overhead_context=LEAST_CONTEXT,
        overhead_generated=(0, 256),
        profile_steps=3,
    )
