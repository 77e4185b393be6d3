"""Which way of attending is the quickest for which shape: what `kernels/gather_attention/table.py` is made from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from benchmarks.decode.clock import clock_of
from benchmarks.machine import last_level_cache_bytes
from benchmarks.registry import BenchmarkError
from benchmarks.timing import Competitor, Limits, contest
from kvtier.kernels.gather_attention import blocked, native
from kvtier.kernels.gather_attention.extras import PLAIN, Extras
from kvtier.kernels.gather_attention.plan import plan
from kvtier.kernels.gather_attention.table import TILES, BreakEven, Tile, shape_of
from kvtier.kernels.tiles import padded
from kvtier.types import DTYPE_BYTES, DTypeName

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "run", "show"]

_PLAINLY: Final[dict[str, Any]] = {"scale": 128**-0.5, "softcap": None, "visible": None}
HEADS, GROUP, DIM, SLOTS = 8, 4, 128, 16
UNIFIED: Final = Extras(unified_max=4.0)
"""Near the greatest of thousands of normal logits."""
_ALWAYS: Final = {"fused": BreakEven(rows=0, key_bytes=1 << 60), "streamed": BreakEven(rows=1 << 30, key_bytes=0)}
_LAUNCHES: Final = 20
"""On a GPU a round is so many launches, or the host would be measured."""


class Case(NamedTuple):
    """One problem: queries per head, keys, their type, and whether they lie in pages."""

    dtype: DTypeName
    queries: int
    keys: int
    paged: bool

    @property
    def rows(self) -> int:
        """Queries per KV head."""
        return GROUP * self.queries

    def on(self, device: torch.device) -> Callable[..., object]:
        """Attention over random keys, to be called with an implementation."""
        dtype = getattr(torch, self.dtype)
        q = torch.randn(1, HEADS * GROUP, self.queries, DIM, device=device, dtype=dtype)
        if not self.paged:
            k, v = (torch.randn(1, HEADS, self.keys, DIM, device=device, dtype=dtype) for _ in range(2))
            return lambda implementation, extras=PLAIN: implementation.attend_run(q, k, v, **_PLAINLY, extras=extras)
        pages = HEADS * self.keys // SLOTS
        k, v = (torch.randn(pages, SLOTS, DIM, device=device, dtype=dtype) for _ in range(2))
        frames = torch.randperm(pages, device=device).view(1, HEADS, -1)
        return lambda implementation, extras=PLAIN: implementation.attend_pages(
            q, k, v, frames, **_PLAINLY, extras=extras
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The device."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to attend (default: cpu)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time every way of every case.

    Raises
    ------
    BenchmarkError
        Without a GPU where one was asked for.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda needs a CUDA device, and torch sees none")
    limits = Limits(seconds=0.05, least=3, most=3, warm_up=1) if options.quick else _limits(device)
    flushed = torch.empty((1 << 20 if options.quick else 4 * last_level_cache_bytes()) // 4, device=device)

    rows = []
    with torch.no_grad():
        for case in _cases(device, options.quick):
            attend = case.on(device)
            ways = _gpu_ways(case, attend) if device.type == "cuda" else _cpu_ways(attend)
            timings = contest(ways, limits=limits, between=flushed.zero_, clock=clock_of(options.device))
            best = min(timings, key=lambda name: timings[name].median_s)
            nbytes = 2 * HEADS * case.keys * DIM * DTYPE_BYTES[case.dtype]
            per_call = {name: timing.median_s / _calls(device) for name, timing in timings.items()}
            rows.append({**case._asdict(), "rows": case.rows, "bytes": nbytes, "best": best, "median_s": per_call})
    return {"device": options.device, "shape": {"kv_heads": HEADS, "group": GROUP, "dim": DIM}, "cases": rows}


def show(result: Mapping[str, Any], console: Console) -> None:
    """A line a case, its ways in microseconds, the best first."""
    for case in result["cases"]:
        where = "pages" if case["paged"] else "run"
        ways = sorted(case["median_s"].items(), key=lambda item: item[1])
        told = ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in ways)
        console.print(f"{case['dtype']} {where}, {case['rows']} queries a head, {case['keys']} keys: {told}")


def _limits(device: torch.device) -> Limits:
    return (
        Limits(seconds=0.2, least=5, most=20, warm_up=2)
        if device.type == "cuda"
        else Limits(seconds=2.0, least=7, most=40, warm_up=2)
    )


def _cases(device: torch.device, quick: bool) -> list[Case]:
    """Few and many queries, few and many keys; in pages and not."""
    if quick:
        return [Case("float32", 1, 256, paged=False), Case("bfloat16", 4, 256, paged=True)]
    if device.type == "cuda":
        return [
            Case(dtype, queries, keys, paged=True)
            for dtype in ("bfloat16", "float32")
            for queries in (1, 32)
            for keys in (8192, 131072 // queries)
        ]
    few = [Case(dtype, 1, keys, paged) for dtype, paged in _STORED for keys in (512, 1024, 2048, 4096)]
    many = [Case(dtype, queries, 16384, paged) for dtype, paged in _STORED for queries in (1, 2, 3, 4, 8)]
    return [*few, *many]


_STORED: Final[Sequence[tuple[DTypeName, bool]]] = (("float32", False), ("bfloat16", False), ("float32", True))


def _calls(device: torch.device) -> int:
    return _LAUNCHES if device.type == "cuda" else 1


def _cpu_ways(attend: Callable[..., object]) -> list[Competitor]:
    """In C where that is built; in torch fused and streamed, and streamed in one pass relative to a number."""

    def way(point: BreakEven, extras: Extras = PLAIN) -> Callable[[int], Callable[[], object]]:
        def call() -> None:
            with _points(point):
                attend(blocked, extras)

        return lambda _: call

    found = [Competitor(name, way(point)) for name, point in _ALWAYS.items()]
    found.append(Competitor("unified", way(_ALWAYS["streamed"], UNIFIED)))
    if native.obstacle(torch.device("cpu")) is None:
        found.append(Competitor("native", lambda _: lambda: attend(native)))
    return found


@contextmanager
def _points(point: BreakEven) -> Iterator[None]:
    """One way for all, whatever the table says."""
    before = blocked.VIEWS, blocked.COPIES
    blocked.VIEWS = blocked.COPIES = point  # type: ignore[misc]
    try:
        yield
    finally:
        blocked.VIEWS, blocked.COPIES = before  # type: ignore[misc]


def _gpu_ways(case: Case, attend: Callable[..., object]) -> list[Competitor]:
    """The tile of the table and its neighbours, and the table's relative to a number."""
    shape = shape_of(rows=case.rows, padded_dim=padded(DIM), element_bytes=DTYPE_BYTES[case.dtype])
    usual = TILES[shape]
    tiles = [usual]
    tiles += [usual._replace(keys=keys) for keys in (usual.keys // 2, usual.keys * 2)]
    tiles += [usual._replace(warps=warps) for warps in (4, 8) if warps != usual.warps]
    tiles += [usual._replace(stages=stages) for stages in (2, 3, 4) if stages != usual.stages]

    from kvtier.kernels.gather_attention import triton

    def launches(tile: Tile, extras: Extras = PLAIN) -> Callable[[int], Callable[[], object]]:
        def call() -> None:
            TILES[shape] = tile
            plan.cache_clear()
            try:
                for _ in range(_LAUNCHES):
                    attend(triton, extras)
            finally:
                TILES[shape] = usual
                plan.cache_clear()

        return lambda _: call

    found = [Competitor(f"{tile.keys} keys {tile.warps} warps {tile.stages} stages", launches(tile)) for tile in tiles]
    return [*found, Competitor("unified", launches(usual, UNIFIED))]
