"""The POSIX engine by number of threads, beside fio on the same directory: where the default queue depth comes from."""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.registry import BenchmarkError
from benchmarks.store import fio
from kvtier.storage_backends.engines import EngineFile, PosixEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned
from kvtier.types import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "run", "show"]

_THREADS: Final = (1, 2, 4, 8, 16)
_PIECES: Final = (16 << 10, 64 << 10, 1 << 20, 8 << 20)
_VERBS: Final = ("write", "read", "randread")
_BATCH_BYTES: Final = 64 << 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where, how much, how often."""
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the drive to measure")
    parser.add_argument("--total", type=int, default=512, help="MiB written and read at each point (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each point, interleaved (default: 5)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second for each size of piece: the engine at each number of threads, fio at each of its settings."""
    if (reason := fio.missing()) is not None:
        raise BenchmarkError(reason)
    total = 8 << 20 if options.quick else options.total << 20
    repeats = 1 if options.quick else options.repeats
    cases = []
    with tempfile.TemporaryDirectory(prefix="kvtier-engines-", dir=options.directory) as name:
        for piece in _PIECES[1:3] if options.quick else _PIECES:
            print(f"pieces of {format_bytes(piece)}", file=sys.stderr, flush=True)
            cases.append({"piece_bytes": piece, "speeds": _measure(Path(name), piece, max(4 * piece, total), repeats)})
    settings = {"total_bytes": total, "repeats": repeats, "directory": str(options.directory), "fio": fio.version()}
    return {"settings": settings, "results": cases}


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table a verb, in MiB/s, each cell a median; the best of fio last."""
    from rich.table import Table

    for verb in _VERBS:
        table = Table(title=f"{verb}, MiB/s", title_justify="left", show_edge=False)
        contestants = list(result["results"][0]["speeds"])
        for column in ("piece", *contestants):
            table.add_column(column, justify="right")
        for case in result["results"]:
            cells = (statistics.median(case["speeds"][name][verb]) / 2**20 for name in contestants)
            table.add_row(format_bytes(case["piece_bytes"]), *(f"{cell:.0f}" for cell in cells))
        console.print(table)


def _measure(directory: Path, piece: int, total: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Speeds of every contestant, one run of each in turn."""
    load = fio.Load(piece_bytes=piece, total_bytes=total, then=("read", "randread"))
    contestants: dict[str, Callable[[], Mapping[str, float]]] = {
        f"{count} threads": lambda count=count: _engine(directory / "engine", piece, total, count)  # type: ignore[misc]
        for count in _THREADS
    }
    for setting in fio.SETTINGS:
        contestants[f"fio {setting.label}"] = lambda setting=setting: fio.run(  # type: ignore[misc]
            load, setting, directory / "fio", direct=True
        )
    speeds: dict[str, dict[str, list[float]]] = {name: {verb: [] for verb in _VERBS} for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            for verb, speed in contestant().items():
                speeds[name][verb].append(speed)
    return speeds


def _engine(directory: Path, piece: int, total: int, threads: int) -> dict[str, float]:
    """Bytes a second of a new file written, read in order and read in any order, in batches as a store makes them."""
    directory.mkdir()
    offsets = [at * piece for at in range(total // piece)]
    shuffled = random.Random(0).sample(offsets, len(offsets))  # noqa: S311 - the same order for all
    try:
        with PosixEngine(threads) as engine:
            file = engine.open(directory / "data", writable=True, create=True)
            file.allocate(total)
            memory = empty_aligned(min(total, max(piece, _BATCH_BYTES))).random_(0, 256)
            speeds = {"write": _speed(engine.write, file, offsets, memory, piece)}
            speeds["read"] = _speed(engine.read, file, offsets, memory, piece)
            speeds["randread"] = _speed(engine.read, file, shuffled, memory, piece)
            file.close()
        return speeds
    finally:
        shutil.rmtree(directory)


def _speed(
    call: Callable[[Sequence[Transfer]], list[OSError | None]],
    file: EngineFile,
    offsets: Sequence[int],
    memory: torch.Tensor,
    piece: int,
) -> float:
    """Bytes a second."""
    count = memory.numel() // piece
    start = time.perf_counter()
    for first in range(0, len(offsets), count):
        batch = [
            Transfer(file, offset, memory[place * piece : (place + 1) * piece])
            for place, offset in enumerate(offsets[first : first + count])
        ]
        if any(call(batch)):
            raise BenchmarkError(f"the drive under {file.path} failed")
    return len(offsets) * piece / (time.perf_counter() - start)
