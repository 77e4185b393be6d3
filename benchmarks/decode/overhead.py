"""What a session costs beside its kernels: append and attend, less the kernel calls they make, per layer and step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import torch

from benchmarks.decode.kernel_clock import KernelClock
from benchmarks.decode.profile import profile
from benchmarks.decode.settings import Settings, refusal
from benchmarks.peers.streams import Streams
from benchmarks.peers.tiered import POLICIES, TieredLayers
from benchmarks.timing import Competitor, contest, timing_of
from benchmarks.workload import Shape, random_kv
from kvtier.types import DTypeName

__all__ = ["measure"]

TARGET_US: Final = 200.0


def measure(settings: Settings, streams: Streams, context: int, dtype: DTypeName) -> dict[str, Any]:
    """One case: a row and a profile for every policy."""
    shape, layers = Shape(dtype=dtype), settings.overhead_layers
    reason = refusal((2 * layers + 1) * context * shape.token_bytes)
    if reason is not None:
        return {"skipped": reason}
    drawn = [random_kv(shape, context) for _ in range(layers)]
    rows = []
    # As transformers calls it: generate() records no gradients.
    with torch.no_grad():
        for name, generated in itertools.product(POLICIES, settings.overhead_generated):
            with TieredLayers(name, drawn, shape, generated=generated) as held:
                rows.append({"name": f"kvtier: {name}", "generated": generated, **_row(held, settings, streams)})
    return {"layers": layers, "target_us": TARGET_US, "rows": rows}


def _row(held: TieredLayers, settings: Settings, streams: Streams) -> dict[str, Any]:
    """Microseconds per layer: of all, of the kernels, and of the rest, both as a difference and by a clock inside."""
    inside: list[tuple[float, float]] = []
    clock = KernelClock()

    def session(_: int) -> Callable[[], object]:
        tokens = held.tokens()
        return lambda: held.step(tokens)

    def clocked(_: int) -> Callable[[], object]:
        tokens = held.tokens()

        def call() -> None:
            clock.restart()
            started = time.perf_counter()
            held.step(tokens)
            inside.append((time.perf_counter() - started, clock.seconds))

        return call

    with clock.on():
        contest([Competitor("clocked", clocked)], limits=settings.overhead_limits, between=streams.flush)
    competitors = [Competitor("session", session), Competitor("kernels", lambda _: clock.replay)]
    timings = contest(competitors, limits=settings.replay_limits, between=streams.flush)
    timed, each = inside[settings.overhead_limits.warm_up :], 1e6 / held.layers
    beside = [whole - kernels for whole, kernels in timed]
    rest = timing_of(beside)
    return {
        "rounds": rest.rounds,
        "session_us": timings["session"].median_s * each,
        "kernels_us": timings["kernels"].median_s * each,
        "overhead_by_difference_us": (timings["session"].median_s - timings["kernels"].median_s) * each,
        "overhead_us": rest.median_s * each,
        "overhead_mean_us": statistics.fmean(beside) * each,
        "overhead_p10_us": rest.p10_s * each,
        "overhead_p90_us": rest.p90_s * each,
        "kernels_inside_us": statistics.median(kernels for _, kernels in timed) * each,
        "kernel_calls": clock.calls_by_name(),
        "session_timing": asdict(timings["session"]),
        "profile": profile(held, settings.profile_steps, between=streams.flush),
    }
