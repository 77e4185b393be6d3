"""Competitors timed in turns: so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

__all__ = ["Competitor", "Limits", "Timing", "contest", "event_seconds", "timing_of", "wall_seconds"]

Clock: TypeAlias = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class Competitor:
    """One thing to time.

    Parameters
    ----------
    prepare : callable
        Given the number of the round, makes what the round needs and returns the call that is timed.
    """

    name: str
    prepare: Callable[[int], Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many rounds to time: until ``seconds`` are over, but at least ``least`` and at most ``most``.

    Parameters
    ----------
    warm_up : int
        Rounds before those, not timed.
    """

    seconds: float
    least: int
    most: int
    warm_up: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one competitor over its rounds: median, and the 10th and 90th percentile."""

    rounds: int
    median_s: float
    p10_s: float
    p90_s: float


def timing_of(seconds: Sequence[float]) -> Timing:
    """Summarise the seconds of at least two rounds."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(rounds=len(seconds), median_s=statistics.median(seconds), p10_s=tenths[0], p90_s=tenths[-1])


def wall_seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def event_seconds(call: Callable[[], object]) -> float:
    """How long the GPU works for a call, by events around it."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    call()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1e3


def contest(
    competitors: Sequence[Competitor],
    *,
    limits: Limits,
    between: Callable[[], object],
    clock: Clock = wall_seconds,
) -> dict[str, Timing]:
    """Time all competitors once a round, in an order drawn anew, and ``between`` before each: it empties the caches."""
    order, shuffle = list(competitors), random.Random(0).shuffle  # noqa: S311 - an order, not a secret
    seconds: dict[str, list[float]] = {competitor.name: [] for competitor in competitors}
    gc.collect()
    gc.disable()
    try:
        begun, timed = time.perf_counter(), 0
        for turn in range(limits.warm_up + limits.most):
            if turn == limits.warm_up:
                begun = time.perf_counter()
            if timed >= limits.least and time.perf_counter() - begun > limits.seconds:
                break
            shuffle(order)
            for competitor in order:
                call = competitor.prepare(turn)
                between()
                elapsed = clock(call)
                if turn >= limits.warm_up:
                    seconds[competitor.name].append(elapsed)
            timed += turn >= limits.warm_up
    finally:
        gc.enable()
    return {name: timing_of(rounds) for name, rounds in seconds.items()}
