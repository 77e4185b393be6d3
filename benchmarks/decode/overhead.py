"""What a session costs beside its kernels: append and attend, less the kernel calls they make, per layer and step."""

from __future__ import annotations

import cProfile
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import CodeType
from typing import Any, Final

import kvtier
from benchmarks.decode.kernel_clock import KernelClock
from benchmarks.decode.settings import Settings, refusal
from benchmarks.peers.streams import Streams
from benchmarks.peers.tiered import POLICIES, TieredLayers
from benchmarks.timing import Competitor, contest, timing_of
from benchmarks.workload import Shape, random_kv
from kvtier.types import DTypeName

__all__ = ["measure"]

TARGET_US: Final = 200.0
_TOP: Final = 15
_ROOT: Final = Path(kvtier.__file__).resolve().parent.parent


def measure(settings: Settings, streams: Streams, context: int, dtype: DTypeName) -> dict[str, Any]:
    """One case: a row and a profile for every policy."""
    shape, layers = Shape(dtype=dtype), settings.overhead_layers
    reason = refusal((2 * layers + 1) * context * shape.token_bytes)
    if reason is not None:
        return {"skipped": reason}
    rows = []
    for name, generated in itertools.product(POLICIES, settings.overhead_generated):
        drawn = [random_kv(shape, context) for _ in range(layers)]
        with TieredLayers(name, drawn, shape, generated=generated) as held:
            del drawn
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
            with clock:
                started = time.perf_counter()
                held.step(tokens)
                inside.append((time.perf_counter() - started, clock.seconds))

        return call

    competitors = [
        Competitor("session", session),
        Competitor("clocked", clocked),
        Competitor("kernels", lambda _: clock.replay),
    ]
    clocked(0)()
    limits = settings.overhead_limits
    timings = contest(competitors, limits=limits, between=streams.flush)
    timed = inside[-timings["clocked"].rounds :]
    each = 1e6 / held.layers
    rest = timing_of([whole - kernels for whole, kernels in timed])
    return {
        "rounds": timings["session"].rounds,
        "session_us": timings["session"].median_s * each,
        "kernels_us": timings["kernels"].median_s * each,
        "overhead_by_difference_us": (timings["session"].median_s - timings["kernels"].median_s) * each,
        "overhead_us": rest.median_s * each,
        "overhead_p10_us": rest.p10_s * each,
        "overhead_p90_us": rest.p90_s * each,
        "kernels_inside_us": statistics.median(kernels for _, kernels in timed) * each,
        "kernel_calls": clock.calls_by_name(),
        "session_timing": asdict(timings["session"]),
        "profile": _profile(held, settings.profile_steps),
    }


def _profile(held: TieredLayers, steps: int) -> list[dict[str, Any]]:
    """Functions with the most time of their own, in microseconds per layer and step; the profiler itself adds some."""
    profiler = cProfile.Profile()
    for _ in range(steps):
        tokens = held.tokens()
        profiler.enable()
        held.step(tokens)
        profiler.disable()
    each = 1 / (steps * held.layers)
    entries = sorted(profiler.getstats(), key=lambda entry: -entry.inlinetime)[:_TOP]
    return [
        {
            "function": _readable(entry.code),
            "calls": entry.callcount * each,
            "own_us": entry.inlinetime * each * 1e6,
            "total_us": entry.totaltime * each * 1e6,
        }
        for entry in entries
    ]


def _readable(code: CodeType | str) -> str:
    """A function with its file, as seen from the checkout or from site-packages; a built-in has none."""
    if isinstance(code, str):
        return code
    path = Path(code.co_filename).resolve()
    shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(path.parent.name, path.name)
    return f"{shown}:{code.co_firstlineno} {code.co_qualname}"
