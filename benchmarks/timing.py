"""Competitors timed in turns: so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Competitor", "Limits", "Timing", "contest", "timing_of"]


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


def contest(competitors: Sequence[Competitor], *, limits: Limits, between: Callable[[], object]) -> dict[str, Timing]:
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
                elapsed = _timed(competitor, turn, between)
                if turn >= limits.warm_up:
                    seconds[competitor.name].append(elapsed)
            timed += turn >= limits.warm_up
    finally:
        gc.enable()
    return {name: timing_of(rounds) for name, rounds in seconds.items()}


def _timed(competitor: Competitor, turn: int, between: Callable[[], object]) -> float:
    call = competitor.prepare(turn)
    between()
    _settle()
    started = time.perf_counter()
    call()
    _settle()
    return time.perf_counter() - started


def _settle() -> None:
    """Wait for what a GPU still has to do, where one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
