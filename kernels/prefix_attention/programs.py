"""A batch with shared prefixes as programs of a GPU, about equally long: a long prefix is cut, a short list is not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from kvtier.kernels.gather_attention.table import SPLITS, TILES, Tile, shape_of
from kvtier.kernels.tiles import padded, processors
from kvtier.types import DTYPE_BYTES, LayerLayout

__all__ = ["Programs", "Span", "Task", "cut", "tile"]

MOST_FP32_ROWS: Final = 32


class Span(NamedTuple):
    """Where a list of keys lies among all pages of its kind: ``length`` tokens from page ``page`` on."""

    page: int
    length: int


class Task(NamedTuple):
    """One tile of rows over one split of a list of keys, for every KV head; a row of the table that kernels read.

    Rows are the queries of ``members`` requests, from ``first`` on in the order of groups; ``own`` is 1 where they
    attend to a request's own keys and 0 where to a prefix; ``part`` counts the splits of a request, its prefix's first.
    """

    own: int
    first: int
    members: int
    tile: int
    page: int
    start: int
    stop: int
    length: int
    part: int


class Programs(NamedTuple):
    """What a launch runs over.

    ``tasks`` [n, fields of Task], ``order`` [B] (requests, group by group) and ``part_starts`` [B + 1] (where the parts
    of each request begin among all ``parts``) are int32.
    """

    tile: Tile
    tasks: torch.Tensor
    order: torch.Tensor
    part_starts: torch.Tensor
    parts: int


class _Work(NamedTuple):
    """A list of keys and who attends to it."""

    own: int
    first: int
    members: int
    span: Span


def tile(*, rows: int, dim: int, element_bytes: int) -> Tile:
    """Tile for at most ``rows`` rows over one list and keys of ``dim`` channels: that of gather_attention, or smaller.

    Tasks take registers, too: fp32 gets fewer rows, wide keys more warps.
    """
    shape = shape_of(rows=rows, padded_dim=padded(dim), element_bytes=element_bytes)
    found = TILES[shape]
    most = found.rows if shape.half else min(found.rows, MOST_FP32_ROWS)
    return found._replace(rows=min(padded(rows), most), warps=found.warps if shape.narrow else max(found.warps, 8))


def cut(
    members: Sequence[Sequence[int]],
    prefixes: Sequence[Span],
    owns: Sequence[Span],
    queries: int,
    layout: LayerLayout,
    device: torch.device,
) -> Programs:
    """Tasks of a batch, the longest first, with their tables on ``device``."""
    order = [request for group in members for request in group]
    starts = itertools.accumulate((len(group) for group in members), initial=0)
    work = [_Work(0, first, len(group), span) for first, group, span in zip(starts, members, prefixes, strict=False)]
    work += [_Work(1, first, 1, owns[request]) for first, request in enumerate(order)]
    work = [item for item in work if item.members and item.span.length]
    member_rows = layout.group_size * queries
    shape = tile(
        rows=max((item.members * member_rows for item in work), default=1),
        dim=max(layout.key_dim, layout.value_dim),
        element_bytes=DTYPE_BYTES[layout.dtype],
    )
    tiles = [-(-item.members * member_rows // shape.rows) for item in work]
    loads = sum(count * item.span.length for count, item in zip(tiles, work, strict=True)) * layout.num_kv_heads
    split = max(SPLITS.least_keys, -(-loads // (SPLITS.waves * processors(device))))
    split = -(-split // shape.keys) * shape.keys

    tasks, parts = _tasks(work, tiles, order, split)
    starts_of_parts = [0, *itertools.accumulate(parts)]
    return Programs(
        tile=shape,
        tasks=torch.tensor(tasks, dtype=torch.int32).view(-1, len(Task._fields)).to(device),
        order=torch.tensor(order, dtype=torch.int32).to(device),
        part_starts=torch.tensor(starts_of_parts, dtype=torch.int32).to(device),
        parts=starts_of_parts[-1],
    )


def _tasks(
    work: Sequence[_Work], tiles: Sequence[int], order: Sequence[int], split: int
) -> tuple[list[Task], list[int]]:
    """Tasks of at most ``split`` keys, the longest first, and how many parts each request has."""
    tasks: list[Task] = []
    parts = [0] * len(order)
    for item, count in zip(work, tiles, strict=True):
        page, length = item.span
        requests = order[item.first : item.first + item.members]
        for start in range(0, length, split):
            stop, part = min(start + split, length), parts[requests[0]]
            tasks += [Task(*item[:3], at, page, start, stop, length, part) for at in range(count)]
            for request in requests:
                parts[request] += 1
    tasks.sort(key=lambda task: task.start - task.stop)
    return tasks, parts
