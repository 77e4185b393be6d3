"""Attention of one layer for one token: kvtier's policies, stock transformers, a grouped matmul, the memory's speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

import torch

from benchmarks.decode.clock import clock_of
from benchmarks.decode.settings import Settings, refusal
from benchmarks.peers.grouped import exact_attention, grouped_attention
from benchmarks.peers.stock import StockLayer
from benchmarks.peers.streams import COPY, READ, Streams
from benchmarks.peers.tiered import POLICIES, TieredLayers, Traffic
from benchmarks.registry import BenchmarkError
from benchmarks.timing import Competitor, Timing, contest
from benchmarks.workload import Shape, decode_token, random_kv
from kvtier.types import DTypeName

__all__ = ["measure"]

STOCK: Final = "transformers: update and sdpa"
SDPA: Final = "transformers: sdpa alone"
GROUPED: Final = "grouped matmul"
BASELINES: Final = {"vs_stock": STOCK, "vs_sdpa": SDPA, "vs_grouped": GROUPED}
_MOST_SETS: Final = 4
# A data set is held by the stock cache and by the sessions of two policies; a stock cache that grows is copied.
_COPIES: Final = 3


class DataSet:
    """One random cache, held by every competitor."""

    def __init__(self, shape: Shape, context: int, generated: int, stack: ExitStack) -> None:
        self.stock = StockLayer(random_kv(shape, context), shape)
        self.tiered = {
            name: stack.enter_context(TieredLayers(name, [self.stock.held], shape, generated=generated))
            for name in POLICIES
        }


def measure(settings: Settings, streams: Streams, context: int, dtype: DTypeName) -> dict[str, Any]:
    """One case: rows of times, bytes and ratios, and how far the exact competitors are from fp64.

    Raises
    ------
    BenchmarkError
        When kvtier's exact attention is not exact, or a policy reads more than its budget.
    """
    shape = Shape(dtype=dtype, device=settings.device)
    layer_bytes = context * shape.token_bytes
    sets = min(_MOST_SETS, max(2, math.ceil(settings.data_sets_bytes / layer_bytes)))
    reason = refusal((sets * _COPIES + 2) * layer_bytes, settings.device)
    if reason is not None:
        return {"skipped": reason}
    with ExitStack() as stack:
        data = [DataSet(shape, context, settings.generated, stack) for _ in range(sets)]
        errors = _errors(data[0], shape, context)
        timings = contest(
            [*_competitors(data, shape), *streams.competitors],
            limits=settings.limits,
            between=streams.flush,
            clock=clock_of(settings.device),
        )
        traffic = _traffic(data, streams)
    rows = [_row(name, timing, traffic[name], timings, streams) for name, timing in timings.items()]
    return {"data_sets": sets, "layer_bytes": layer_bytes, "max_error": errors, "rows": rows}


def _competitors(data: Sequence[DataSet], shape: Shape) -> list[Competitor]:
    def turn(which: int) -> DataSet:
        return data[which % len(data)]

    def stock(which: int) -> Callable[[], object]:
        layer = turn(which).stock
        token = decode_token(shape, layer.held.keys.shape[2])
        return lambda: layer.step(token)

    def sdpa(which: int) -> Callable[[], object]:
        layer, query = turn(which).stock, shape.queries(1)
        return lambda: layer.attend(query)

    def grouped(which: int) -> Callable[[], object]:
        held, query = turn(which).stock.held, shape.queries(1)
        return lambda: grouped_attention(query, held, shape)

    def tiered(name: str) -> Callable[[int], Callable[[], object]]:
        def prepare(which: int) -> Callable[[], object]:
            layers = turn(which).tiered[name]
            tokens = layers.tokens()
            return lambda: layers.step(tokens)

        return prepare

    ours = [Competitor(f"kvtier: {name}", tiered(name)) for name in POLICIES]
    return [*ours, Competitor(STOCK, stock), Competitor(SDPA, sdpa), Competitor(GROUPED, grouped)]


def _errors(data: DataSet, shape: Shape, context: int) -> dict[str, float]:
    """Largest distance from fp64 of those that claim to be exact, before anything was appended."""
    query, session = shape.queries(1), data.tiered["full"].session
    exact = exact_attention(query, data.stock.held, shape)
    ours = session.attend(0, query, torch.tensor([[context - 1]], device=shape.device), scale=shape.scale)
    outs = {
        "kvtier: full": ours,
        SDPA: data.stock.attend(query),
        GROUPED: grouped_attention(query, data.stock.held, shape),
    }
    errors = {name: float((out.double() - exact).abs().max()) for name, out in outs.items()}
    rounding = 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    allowed = 2 * errors[SDPA] + rounding
    if not errors["kvtier: full"] <= allowed:
        raise BenchmarkError(
            f"kvtier's exact attention must be within {allowed:.2e} of fp64 (twice the error of stock, and rounding), "
            f"it is {errors['kvtier: full']:.2e} away at {context} tokens of {shape.dtype}"
        )
    return errors


def _traffic(data: Sequence[DataSet], streams: Streams) -> dict[str, Traffic]:
    """Bytes that one step of each competitor read."""
    dense = Traffic(kv_bytes=sum(tensor.nbytes for tensor in data[0].stock.held))
    found = {name: Traffic(kv_bytes=nbytes) for name, nbytes in streams.nbytes.items()}
    found |= dict.fromkeys((STOCK, SDPA, GROUPED), dense)
    for name in POLICIES:
        each = [one.tiered[name].meter.per_step() for one in data]
        found[f"kvtier: {name}"] = Traffic(
            kv_bytes=sum(one.kv_bytes for one in each) // len(each),
            sketch_bytes=sum(one.sketch_bytes for one in each) // len(each),
        )
    return found


def _row(
    name: str, timing: Timing, traffic: Traffic, timings: Mapping[str, Timing], streams: Streams
) -> dict[str, Any]:
    speed = traffic.nbytes / timing.median_s
    row = {
        "name": name,
        **asdict(timing),
        **asdict(traffic),
        "gb_per_s": speed / 1e9,
        "of_read_bandwidth": speed / (streams.nbytes[READ] / timings[READ].median_s),
    }
    if name not in (READ, COPY):
        row |= {key: timings[base].median_s / timing.median_s for key, base in BASELINES.items()}
    return row
