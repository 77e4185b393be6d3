"""Which page columns of a sequence can be attended where they lie, and which must be read into staging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvtier.core.arena import Place
from kvtier.core.policy import IntArray
from kvtier.core.tier import PageStore

__all__ = ["PageViews", "SlabFrames", "join_short_runs", "split_columns"]

_SHORT_RUN = 4
_MOST_RUNS = 4


@dataclass(frozen=True, slots=True, eq=False)
class PageViews:
    """Where the columns lie that are runs, and the other columns, ascending.

    Places and no views: a sequence that rests must not keep a slab alive that was dropped. Valid while the arena's
    version and the number of pages stay as they were.
    """

    version: int
    pages: int
    runs: list[Place]
    loose: IntArray

    @classmethod
    def of(cls, store: PageStore, pages: IntArray) -> PageViews:
        """The views over ``pages`` [Hk, N] as they lie now; several short runs are read together instead."""
        here, frames = store.resident(pages).all(axis=0), store.frames(pages)
        runs: list[Place] = []
        loose: list[IntArray] = [np.flatnonzero(~here)]
        for first, last in _stretches(np.flatnonzero(here)):
            found, irregular = store.arena.places(frames[:, first:last])
            runs += [run._replace(start=run.start + first, stop=run.stop + first) for run in found]
            loose.append(irregular + first)
        short = [run for run in runs if run.stop - run.start < _SHORT_RUN]
        if len(short) > 1:
            loose += [np.arange(run.start, run.stop) for run in short]
            runs = [run for run in runs if run.stop - run.start >= _SHORT_RUN]
        return cls(store.arena.version, pages.shape[1], runs, np.sort(np.concatenate(loose)))


class SlabFrames(NamedTuple):
    """Frames K [F, P, Dk] and V [F, P, Dv] of a slab, and which of them hold the pages of a sequence [1, Hk, N].

    ``first`` [1, Hk, 1] are those of column 0 where the others follow one by one.
    """

    keys: torch.Tensor
    values: torch.Tensor
    frames: torch.Tensor
    first: torch.Tensor | None

    def at(self, columns: torch.Tensor) -> torch.Tensor:
        """Frames of page columns [1, Hk, n]."""
        return self.frames.gather(2, columns) if self.first is None else columns + self.first


def join_short_runs(store: PageStore, pages: IntArray, views: PageViews) -> bool:
    """Move the newest runs into one when a long generation left many; whether anything moved.

    Runs are joined with all later ones that together are at least as long, so a page moves about log(N) times.
    """
    if len(views.runs) <= _MOST_RUNS:
        return False
    start, length = len(views.runs), 0
    while start and views.runs[start - 1].stop - views.runs[start - 1].start <= max(length, store.block_pages):
        start -= 1
        length += views.runs[start].stop - views.runs[start].start
    newest = views.runs[start:]
    if len(newest) < 2 or newest[-1].stop - newest[0].start != length:
        return False
    return store.join(pages[:, newest[0].start : newest[-1].stop])


def split_columns(columns: IntArray, most: int) -> list[IntArray]:
    """Consecutive columns in groups of at most ``most``."""
    return [
        np.arange(start, min(start + most, last))
        for first, last in _stretches(columns)
        for start in range(first, last, most)
    ]


def _stretches(columns: IntArray) -> list[tuple[int, int]]:
    """Ranges of consecutive column numbers."""
    if not columns.size:
        return []
    cuts = np.flatnonzero(np.diff(columns) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(columns, cuts)]
