"""What the Triton kernel must know of keys' or values' format, and how it cuts a problem into programs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

from kvtier.kernels.encoded_attention.formats import BitPlanes, BlockFormat
from kvtier.kernels.encoded_attention.formats.base import CodeKind
from kvtier.kernels.gather_attention.plan import Plan, split
from kvtier.kernels.gather_attention.table import FEW_ROWS, Splits, Tile
from kvtier.kernels.tiles import padded

__all__ = ["Side", "cut_blocks"]

REMEMBERED: Final = 256
WIDEST: Final = 128
LEAST_WIDTH: Final = 16
_FACTORS: Final[dict[CodeKind, float]] = {"unsigned": 1.0, "signed": 1.0, "e4m3": 256.0, "planes": 0.5}
"""What a code is, of the number that the kernel takes for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Keys or values as tiles: a constant of the kernel.

    The columns of a token are read in ``chunks`` of ``width`` bytes; each byte comes apart into ``shares``. All
    channels of one share of a chunk have one scale, unless each channel has its own (``by_channel``).
    """

    kind: CodeKind
    bits: int
    dim: int
    columns: int
    width: int
    chunks: int
    shares: int
    masked: bool
    by_channel: bool
    token_group: int
    channel_group: int
    channel_groups: int
    minima: bool
    minima_at: int
    codes_at: int
    planes: int
    slots: int
    plane_bytes: int
    stored: int
    factor: float

    @classmethod
    @functools.lru_cache(maxsize=REMEMBERED)
    def of(cls, layout: BlockFormat) -> Side | None:
        """The side of a format; None when its groups of channels are too narrow, or too wide, for whole tiles."""
        by_channel = layout.channel_group == 1
        shared = layout.columns if by_channel else math.gcd(layout.columns, layout.channel_group)
        width = min(shared & -shared, WIDEST)
        masked = width < LEAST_WIDTH
        if masked:
            width = padded(layout.columns)
            if not (by_channel or layout.channel_group == layout.dim) or width > WIDEST:
                return None
        if by_channel and layout.token_group < LEAST_WIDTH:
            return None
        return cls(
            kind=layout.code,
            bits=layout.bits,
            dim=layout.dim,
            columns=layout.columns,
            width=width,
            chunks=-(-layout.columns // width),
            shares=8 // layout.bits,
            masked=masked,
            by_channel=by_channel,
            token_group=layout.token_group,
            channel_group=layout.channel_group,
            channel_groups=layout.groups[1],
            minima=layout.has_minima,
            minima_at=layout.groups[0] * layout.groups[1],
            codes_at=layout.codes_at,
            planes=layout.read_planes if isinstance(layout, BitPlanes) else 1,
            slots=layout.slots,
            plane_bytes=layout.slots * layout.columns,
            stored=layout.stored_planes,
            factor=_FACTORS[layout.code],
        )


@functools.lru_cache(maxsize=REMEMBERED)
def cut_blocks(
    keys_side: Side, values_side: Side, *, heads: int, rows: int, keys: int, processors: int, splits: Splits
) -> Plan:
    """Cut a problem into programs; a tile of keys is within a block, and within a group of tokens.

    Tiles have 16 queries also in long prompts: with more the parts of q and of the output spill. Bytes of codes are
    few, so that more of them are under way at once; not of planes, which are loads enough by themselves.
    """
    wide = max(keys_side.dim, values_side.dim) > WIDEST
    groups = [side.token_group for side in (keys_side, values_side) if side.by_channel]
    most = min(32 if wide else 64, keys_side.slots, *groups)
    planes = keys_side.kind == "planes" or values_side.kind == "planes"
    tile = Tile(rows=FEW_ROWS, keys=most, warps=8 if wide else 4, stages=3 if planes else 5)
    return split(tile, heads=heads, rows=rows, keys=keys, processors=processors, splits=splits)
