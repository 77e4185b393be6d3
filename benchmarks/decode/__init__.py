"""One decode step of Llama-3-8B's shape: attention of a layer, a whole model, and what the session costs in Python."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.decode import attention, overhead, step, tables
from benchmarks.decode.settings import LEAST_CONTEXT, PARTS, Settings, settings_of
from benchmarks.options import contexts, words
from benchmarks.peers.streams import Streams
from benchmarks.registry import BenchmarkError

if TYPE_CHECKING:
    from rich.console import Console

    from kvtier.types import DTypeName

__all__ = ["add_options", "run", "show"]

_MEASURES: Mapping[str, Callable[[Settings, Streams, int, DTypeName], dict[str, Any]]] = {
    "attention": attention.measure,
    "step": step.measure,
    "overhead": overhead.measure,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Device, contexts, dtypes and parts."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to decode (default: cpu)")
    parser.add_argument("--contexts", type=contexts(LEAST_CONTEXT), help="tokens in the cache, separated by commas")
    parser.add_argument("--dtypes", type=words("float32", "bfloat16"), help="float32, bfloat16 or both (the default)")
    parser.add_argument("--generated", type=int, help="tokens of the context that came one at a time (default: 256)")
    parser.add_argument("--parts", type=words(*PARTS), help=f"which of {', '.join(PARTS)}; all by default")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every part in every case.

    Raises
    ------
    BenchmarkError
        Without a GPU where one was asked for, and for the overhead there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda needs a CUDA device, and torch sees none")
    if options.device == "cuda" and "overhead" in (options.parts or ()):
        raise BenchmarkError("the overhead is that of the host: measure it with --device cpu")
    settings = settings_of(options)
    streams = Streams(settings.stream_bytes, settings.flush_bytes, torch.device(settings.device))
    results: dict[str, list[dict[str, Any]]] = {part: [] for part in settings.parts}
    torch.manual_seed(settings.seed)
    for part in settings.parts:
        for dtype in settings.dtypes:
            for context in (settings.overhead_context,) if part == "overhead" else settings.contexts:
                print(f"{part}: {context} tokens, {dtype}", file=sys.stderr, flush=True)
                results[part].append(
                    {"context": context, "dtype": dtype, **_MEASURES[part](settings, streams, context, dtype)}
                )
    return {"settings": asdict(settings), "results": results}


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table a part."""
    for part, cases in result["results"].items():
        for table in tables.TABLES[part](cases):
            console.print(table)
