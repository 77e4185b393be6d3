"""Seconds of a step with everything that it started, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.timing import wall_seconds

__all__ = ["clock_of"]


def clock_of(device: str) -> Callable[[Callable[[], object]], float]:
    """The clock of the host; on a GPU from when it has nothing left to do to when it has nothing left again."""
    return _settled_seconds if device == "cuda" else wall_seconds


def _settled_seconds(call: Callable[[], object]) -> float:
    def whole() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return wall_seconds(whole)
