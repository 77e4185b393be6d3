"""Which way of attending is the quickest for which shape: break-even points and tiles, in one table.

The points of the CPU are measured: ``python benchmarks/run.py choices`` does it again (README.md has the numbers). The
tiles of GPUs were chosen by registers and shared memory, which ``python -m kvtier.kernels.aot`` tells; they are not yet
measured, and ``python benchmarks/run.py choices --device cuda`` times them beside their neighbours.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = [
    "COPIES",
    "FEW_ROWS",
    "NATIVE_ROWS",
    "SPLITS",
    "TILES",
    "VIEWS",
    "BreakEven",
    "Shape",
    "Splits",
    "Tile",
    "shape_of",
]


class BreakEven(NamedTuple):
    """Up to ``rows`` queries per KV head over keys of more than ``key_bytes`` are streamed; all others are fused."""

    rows: int
    key_bytes: int

    def fused(self, rows: int, key_bytes: int) -> bool:
        """Whether torch's fused kernel is the quicker way over so many bytes of keys of all heads."""
        return rows > self.rows or key_bytes <= self.key_bytes


NATIVE_ROWS: Final = 16
"""On a CPU, up to so many queries per KV head the C kernel, where it is built, is the quickest at every size."""
VIEWS: Final = BreakEven(rows=8, key_bytes=4 << 20)
"""On a CPU, keys that are read where they lie."""
COPIES: Final = BreakEven(rows=16, key_bytes=4 << 20)
"""On a CPU, keys that are gathered or converted first."""


class Shape(NamedTuple):
    """What tiles depend on: few folded queries or many, 16-bit elements or wider ones, rows of few bytes or many."""

    few: bool
    half: bool
    narrow: bool


class Tile(NamedTuple):
    """How much of a problem one program of a GPU takes at once, and how it is compiled.

    ``skip`` lets it pass over tiles that no query sees: not in fp32, where the branch costs registers that the products
    need, and not for few queries, which see nearly everything.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    skip: bool = False


FEW_ROWS: Final = 16
"""Folded queries that fit into one tile of a tensor core."""
WIDE: Final = 256
"""Bytes of a key, padded, from which on large tiles do not fit into the registers."""

TILES: Final = {
    Shape(few=True, half=True, narrow=True): Tile(rows=16, keys=64, warps=4, stages=3),
    Shape(few=True, half=True, narrow=False): Tile(rows=16, keys=32, warps=4, stages=3),
    Shape(few=True, half=False, narrow=True): Tile(rows=16, keys=64, warps=8, stages=2),
    Shape(few=True, half=False, narrow=False): Tile(rows=16, keys=32, warps=8, stages=2),
    Shape(few=False, half=True, narrow=True): Tile(rows=64, keys=32, warps=8, stages=3, skip=True),
    Shape(few=False, half=True, narrow=False): Tile(rows=16, keys=32, warps=8, stages=3, skip=True),
    Shape(few=False, half=False, narrow=True): Tile(rows=64, keys=32, warps=8, stages=2),
    Shape(few=False, half=False, narrow=False): Tile(rows=16, keys=32, warps=8, stages=2),
}


class Splits(NamedTuple):
    """How the keys of a KV head are split over programs of a GPU.

    Parameters
    ----------
    least_keys : int
        Keys below which another split costs more in the merge than it gains in parallel loads.
    waves : int
        Programs per multiprocessor that are wanted.
    """

    least_keys: int
    waves: int
    most: int


SPLITS: Final = Splits(least_keys=256, waves=2, most=128)


def shape_of(*, rows: int, padded_dim: int, element_bytes: int) -> Shape:
    """The class of a problem of ``rows`` folded queries."""
    return Shape(few=rows <= FEW_ROWS, half=element_bytes == 2, narrow=element_bytes * padded_dim <= WIDE)
