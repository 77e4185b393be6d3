"""How an attention problem is cut into programs of a GPU: tiles of queries, splits of keys; planned once a step."""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

from kvtier.kernels.gather_attention.table import TILES, Splits, Tile, shape_of
from kvtier.kernels.tiles import padded

__all__ = ["Plan", "plan", "split"]

REMEMBERED: Final = 256


class Plan(NamedTuple):
    """How one shape is cut into programs: the same for every layer of a step."""

    tile: Tile
    splits: int
    split_keys: int


@functools.lru_cache(maxsize=REMEMBERED)
def plan(*, heads: int, rows: int, keys: int, dim: int, element_bytes: int, processors: int, splits: Splits) -> Plan:
    """Cut ``rows`` folded queries of ``heads`` (B * Hk) heads over ``keys`` keys into programs.

    Splits are as many as fill the multiprocessors ``waves`` times, as far as each has keys enough; their length is a
    multiple of the tile, so that all but the last are equal. Plans are remembered by shape: the first layer of a step
    makes it, the others find it.
    """
    tile = TILES[shape_of(rows=rows, padded_dim=padded(dim), element_bytes=element_bytes)]
    return split(tile, heads=heads, rows=rows, keys=keys, processors=processors, splits=splits)


def split(tile: Tile, *, heads: int, rows: int, keys: int, processors: int, splits: Splits) -> Plan:
    """The same with a given tile."""
    tiles = heads * -(-rows // tile.rows)
    wanted = max(1, min(splits.waves * processors // max(tiles, 1), keys // splits.least_keys, splits.most))
    split_keys = max(1, -(-keys // wanted // tile.keys)) * tile.keys if wanted > 1 else max(keys, 1)
    return Plan(tile=tile, splits=max(1, -(-keys // split_keys)), split_keys=split_keys)
