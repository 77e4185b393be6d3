"""How an attention problem is cut into programs of a GPU: tiles of queries, splits of keys."""

from __future__ import annotations

from typing import Final, NamedTuple

from kvtier.kernels.tiles import padded

__all__ = ["DECODE_ROWS", "Plan", "plan"]

DECODE_ROWS: Final = 16
"""Up to this many folded queries one tile is enough; also the tile where keys are wide."""
PREFILL_ROWS: Final = 64
LEAST_SPLIT: Final = 256
"""Keys below which another split costs more in the merge than it gains in parallel loads."""
NARROW_ROW_BYTES: Final = 256
"""Bytes of a key, padded, up to which tiles are large; beyond it they would not fit into the registers."""
WAVES: Final = 2
MOST_SPLITS: Final = 128


class Plan(NamedTuple):
    """How one shape is cut into programs: the same for every layer of a step, so it is worth making once."""

    block_rows: int
    block_keys: int
    splits: int
    split_keys: int
    skip: bool
    warps: int
    stages: int


def plan(*, heads: int, rows: int, keys: int, dim: int, element_bytes: int, processors: int) -> Plan:
    """Cut ``rows`` folded queries of ``heads`` (B * Hk) heads over ``keys`` keys into programs.

    Splits are as many as fill the multiprocessors twice, each of at least 256 keys; their length is a multiple of the
    tile, so that all but the last are equal. Long prompts skip tiles that no query sees; not in fp32, where the branch
    costs registers that the products need.
    """
    decode, half = rows <= DECODE_ROWS, element_bytes == 2
    narrow = element_bytes * padded(dim) <= NARROW_ROW_BYTES
    block_rows = PREFILL_ROWS if narrow and not decode else DECODE_ROWS
    block_keys = 64 if narrow and decode else 32
    tiles = heads * -(-rows // block_rows)
    wanted = max(1, min(WAVES * processors // max(tiles, 1), keys // LEAST_SPLIT, MOST_SPLITS))
    split_keys = max(1, -(-keys // wanted // block_keys)) * block_keys if wanted > 1 else max(keys, 1)
    return Plan(
        block_rows=block_rows,
        block_keys=block_keys,
        splits=max(1, -(-keys // split_keys)),
        split_keys=split_keys,
        skip=half and not decode,
        warps=4 if half and decode else 8,
        stages=3 if half else 2,
    )
