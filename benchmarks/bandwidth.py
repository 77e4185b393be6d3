"""How fast this machine moves bytes: within the device, and between host memory and a GPU."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from benchmarks.machine import last_level_cache_bytes
from benchmarks.registry import BenchmarkError
from benchmarks.timing import event_seconds, wall_seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "run", "show"]

_ROUNDS: Final = 15
_DEVICE_BYTES: Final = 4 << 30
_HOST_BYTES: Final = 512 << 20
_QUICK_BYTES: Final = 8 << 20


class Move(NamedTuple):
    """Something that moves ``nbytes`` of memory traffic when it is called."""

    name: str
    nbytes: int
    call: Callable[[], object]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The device."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="whose memory (default: cpu)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The median of fifteen rounds of every move.

    Raises
    ------
    BenchmarkError
        Without a GPU where one was asked for.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda needs a CUDA device, and torch sees none")
    moves = _within(device, options.quick)
    if device.type == "cuda":
        moves += _across(device, options.quick)
    rows = []
    for move in moves:
        seconds = _median(move.call, device)
        rows.append(
            {"name": move.name, "bytes": move.nbytes, "median_s": seconds, "gb_per_s": move.nbytes / seconds / 1e9}
        )
    return {"device": options.device, "rounds": _ROUNDS, "rows": rows}


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table."""
    from rich.table import Table

    table = Table(title=f"memory of {result['device']}", title_justify="left")
    for column in ("move", "MiB", "ms", "GB/s"):
        table.add_column(column, justify="left" if column == "move" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"], f"{row['bytes'] / 2**20:.0f}", f"{row['median_s'] * 1e3:.2f}", f"{row['gb_per_s']:.1f}"
        )
    console.print(table)


def _within(device: torch.device, quick: bool) -> list[Move]:
    """A read and a copy of memory that no cache holds."""
    size = _DEVICE_BYTES if device.type == "cuda" else 16 * last_level_cache_bytes()
    source = torch.rand((_QUICK_BYTES if quick else size) // 4, device=device)
    target = torch.empty_like(source)
    return [
        Move("read", source.nbytes, source.sum),
        Move("copy, bytes read and written", 2 * source.nbytes, lambda: target.copy_(source)),
    ]


def _across(device: torch.device, quick: bool) -> list[Move]:
    """Copies between host memory, page-locked or not, and the device."""
    moves = []
    for word, pinned in (("page-locked", True), ("pageable", False)):
        host = torch.zeros((_QUICK_BYTES if quick else _HOST_BYTES), dtype=torch.uint8, pin_memory=pinned)
        held = torch.zeros_like(host, device=device)
        moves += [
            Move(f"{word} host memory to device", host.nbytes, lambda a=held, b=host: a.copy_(b, non_blocking=True)),
            Move(f"device to {word} host memory", host.nbytes, lambda a=host, b=held: a.copy_(b, non_blocking=True)),
        ]
    return moves


def _median(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by the clock of the device."""
    clock = event_seconds if device.type == "cuda" else wall_seconds
    return statistics.median([clock(call) for _ in range(_ROUNDS + 2)][2:])
