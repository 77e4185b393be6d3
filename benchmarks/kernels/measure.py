"""Timing of one case: every operator in turns with the memory's own speed, and a whole quest step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

import torch

from benchmarks.decode.settings import refusal
from benchmarks.kernels.operators import OPERATORS, Call, Data, Operator
from benchmarks.kernels.settings import Settings
from benchmarks.peers.streams import COPY, READ, Streams
from benchmarks.peers.tiered import TieredLayers
from benchmarks.registry import BenchmarkError
from benchmarks.timing import Competitor, Timing, contest, event_seconds, wall_seconds
from benchmarks.workload import KV, Shape, random_kv
from kvtier.kernels import dispatch
from kvtier.storage_backends.memory import empty_aligned
from kvtier.types import DTypeName, Partial

__all__ = ["LEAST_CONTEXT", "SESSION", "case", "check_all", "device_name"]

LEAST_CONTEXT: Final = 2048
SESSION: Final = "quest"
_SESSION_NAME: Final = "quest at 1/16, the session included"
_SESSION_TARGET: Final = {"float32": 0.35, "bfloat16": 0.35}
_GENERATED: Final = 256
# Keys and values; a session copies them, and the streams and page scores take some.
_COPIES: Final = 3


def device_name(settings: Settings) -> str:
    """What the kernels run on, in words."""
    return str(torch.cuda.get_device_name()) if settings.device == "cuda" else "CPU"


def check_all(settings: Settings) -> None:
    """Compare every operator with its reference on the least context.

    Raises
    ------
    BenchmarkError
        When an answer is wrong.
    """
    for dtype in settings.dtypes:
        data = _data(settings, LEAST_CONTEXT, dtype)
        for name, operator in _wanted(settings, dtype).items():
            call = operator.calls(data)[0]
            got, right = _flat(call.run()).double(), call.truth().double().flatten()
            error = float((got - right).abs().max()) / max(1.0, float(right.abs().max()))
            if not error <= operator.limit:
                raise BenchmarkError(
                    f"{name} in {dtype} must be within {operator.limit} of its reference, and is {error:.1e} off"
                )


def case(settings: Settings, context: int, dtype: DTypeName) -> dict[str, Any]:
    """Rows of times, bytes and shares of the memory's bandwidth."""
    shape = Shape(dtype=dtype)
    reason = refusal((_COPIES if settings.device == "cpu" else 1) * context * shape.token_bytes + settings.stream_bytes)
    if reason is not None:
        return {"skipped": reason}
    data = _data(settings, context, dtype)
    streams = Streams(settings.stream_bytes, settings.flush_bytes, torch.device(settings.device))
    calls = {name: operator.calls(data) for name, operator in _wanted(settings, dtype).items()}
    nbytes = {name: each[0].nbytes for name, each in calls.items()} | streams.nbytes
    competitors = [Competitor(name, _in_turns(each)) for name, each in calls.items()]
    with ExitStack() as stack, torch.no_grad():
        if settings.device == "cpu" and settings.wants(SESSION):
            held = stack.enter_context(TieredLayers(SESSION, [data.held], shape, generated=_GENERATED))
            competitors.append(Competitor(_SESSION_NAME, _steps(held)))
        clock = event_seconds if settings.device == "cuda" else wall_seconds
        everyone = [*competitors, *streams.competitors]
        timings = contest(everyone, limits=settings.limits, between=streams.flush, clock=clock)
        if _SESSION_NAME in timings:
            nbytes[_SESSION_NAME] = held.meter.per_step().nbytes
    base = _bandwidth(settings, timings, nbytes)
    rows = [_row(name, timing, nbytes[name], base, settings, dtype) for name, timing in timings.items()]
    return {"bandwidth_gb_per_s": base / 1e9, "rows": rows}


def _data(settings: Settings, context: int, dtype: DTypeName) -> Data:
    shape, device = Shape(dtype=dtype), torch.device(settings.device)
    return Data(shape, device, KV(*(_placed(tensor, device) for tensor in random_kv(shape, context))))


def _placed(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy where an arena would keep it: on a CPU in huge pages."""
    if device.type != "cpu":
        return drawn.to(device)
    return empty_aligned(drawn.nbytes).view(drawn.dtype).view(drawn.shape).copy_(drawn)


def _wanted(settings: Settings, dtype: DTypeName) -> dict[str, Operator]:
    first = dtype == settings.dtypes[0]
    return {
        name: operator
        for name, operator in OPERATORS.items()
        if settings.wants(operator.folder) and (operator.typed or first)
    }


def _in_turns(calls: Sequence[Call]) -> Callable[[int], Callable[[], object]]:
    return lambda turn: calls[turn % len(calls)].run


def _steps(held: TieredLayers) -> Callable[[int], Callable[[], object]]:
    def prepare(_: int) -> Callable[[], object]:
        tokens = held.tokens()
        return lambda: held.step(tokens)

    return prepare


def _bandwidth(settings: Settings, timings: dict[str, Timing], nbytes: dict[str, int]) -> float:
    """Bytes a second that the memory gives: read on a CPU; read and written in a copy on a GPU, as is usual there."""
    if settings.device == "cpu":
        return nbytes[READ] / timings[READ].median_s
    return 2 * nbytes[COPY] / timings[COPY].median_s


def _row(name: str, timing: Timing, nbytes: int, base: float, settings: Settings, dtype: DTypeName) -> dict[str, Any]:
    speed = nbytes / timing.median_s
    row = {"name": name, **asdict(timing), "bytes_read": nbytes, "gb_per_s": speed / 1e9, "of_bandwidth": speed / base}
    operator = OPERATORS.get(name)
    if operator is not None:
        row["implementation"] = dispatch.chosen(settings.device).choices[operator.folder].implementation
    if settings.device == "cpu":
        targets = _SESSION_TARGET if name == _SESSION_NAME else operator.cpu_target if operator is not None else None
        row["target"] = None if targets is None else targets.get(dtype)
    return row


def _flat(answer: object) -> torch.Tensor:
    """What a kernel returned as one tensor."""
    if isinstance(answer, torch.Tensor):
        return answer.flatten()
    if isinstance(answer, Partial):
        return torch.cat([answer.out.flatten(), answer.lse.flatten()])
    if isinstance(answer, tuple):
        return torch.cat([part.flatten() for part in answer])
    raise BenchmarkError(f"a kernel returned {type(answer).__name__}")
