"""Every operator under kernels/ as something to time: what one call reads, and the answer that the reference gives.

One more operator is a function and one line of ``OPERATORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import torch

from benchmarks.workload import KV, Shape
from kvtier.kernels import (
    column_sums,
    encoded_attention,
    gather_attention,
    lowrank_keys,
    merge_partials,
    pack_pages,
    page_scores,
    page_summaries,
    prefix_attention,
    top_pages,
)
from kvtier.kernels.column_sums import reference as sums_reference
from kvtier.kernels.encoded_attention import reference as encoded_reference
from kvtier.kernels.encoded_attention.formats import BlockFormat, Int8, KiviKeys, KiviValues, Kv4
from kvtier.kernels.gather_attention import reference as attention_reference
from kvtier.kernels.lowrank_keys import reference as lowrank_reference
from kvtier.kernels.merge_partials import reference as merge_reference
from kvtier.kernels.pack_pages import reference as rows_reference
from kvtier.kernels.page_scores import reference as scores_reference
from kvtier.kernels.page_summaries import reference as summaries_reference
from kvtier.kernels.prefix_attention import reference as prefix_reference
from kvtier.kernels.top_pages import reference as pages_reference
from kvtier.types import Partial

__all__ = ["OPERATORS", "SHARE", "Call", "Data", "Operator"]

SHARE: Final = 16
"""Of the pages, one of so many is read by what reads a choice of them."""
PAGE: Final = 16
BLOCK: Final = 64
_WINDOW: Final = 32
_TURNS: Final = 4
_PARTS: Final = 4
_PROMPT: Final = 512
_ENCODED_AT_ONCE: Final = 1024
_RANK: Final = 160
_PLANES: Final = 2
_MEMBERS: Final = 16
_OWN: Final = 64


class Call(NamedTuple):
    """One call, and the same by the reference, each as one tensor; and the bytes that it must read."""

    run: Callable[[], object]
    truth: Callable[[], torch.Tensor]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Data:
    """Random keys and values of one layer on a device."""

    shape: Shape
    device: torch.device
    held: KV

    @property
    def tokens(self) -> int:
        """Keys of a KV head."""
        return self.held.tokens

    def queries(self, count: int) -> torch.Tensor:
        """Random queries [1, Hq, count, D] of the type of the keys."""
        return self.shape.queries(count).to(self.device)

    def arenas(self, slots: int) -> KV:
        """Keys and values as frames of so many slots [F, P, D]."""
        return KV(*(tensor.view(-1, slots, self.shape.head_dim) for tensor in self.held))


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator of kvtier.kernels in one use.

    Parameters
    ----------
    folder : str
        Below kernels/.
    calls : callable
        Several calls over different parts of the data, taken in turns.
    typed : bool
        Whether the type of keys and values makes a difference.
    cpu_target : mapping
        By type: the share of the read bandwidth that is aimed at.
    limit : float
        Largest error against the reference, as a share of the greatest number of the answer.
    """

    folder: str
    calls: Callable[[Data], list[Call]]
    typed: bool = True
    cpu_target: Mapping[str, float] | None = None
    limit: float = 1e-4


def _run(data: Data) -> list[Call]:
    """One query over every key where it lies."""
    query, (keys, values), scale = data.queries(1), data.held, data.shape.scale
    return [
        Call(
            lambda: gather_attention.attend_run(query, keys, values, scale=scale),
            lambda: _joined(
                attention_reference.attend_run(query, keys, values, scale=scale, softcap=None, visible=None)
            ),
            keys.nbytes + values.nbytes,
        )
    ]


def _pages(slots: int) -> Callable[[Data], list[Call]]:
    """One query over a sixteenth of the pages, each KV head its own, in random order."""

    def calls(data: Data) -> list[Call]:
        query, scale = data.queries(1), data.shape.scale
        keys, values = data.arenas(slots)
        return [_over(query, keys, values, frames, scale) for frames in _choices(data, keys.shape[0], slots)]

    return calls


def _over(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, frames: torch.Tensor, scale: float) -> Call:
    page_bytes = keys[0].nbytes + values[0].nbytes
    return Call(
        lambda: gather_attention.attend_pages(query, keys, values, frames, scale=scale),
        lambda: _joined(
            attention_reference.attend_pages(query, keys, values, frames, scale=scale, softcap=None, visible=None)
        ),
        frames.numel() * page_bytes + frames.nbytes,
    )


def _blocks(
    make_keys: Callable[..., BlockFormat], make_values: Callable[..., BlockFormat]
) -> Callable[[Data], list[Call]]:
    """One query over a sixteenth of the blocks of 64 tokens, as they are encoded; bytes are those of the codes."""

    def calls(data: Data) -> list[Call]:
        sizes = {"slots": BLOCK, "dim": data.shape.head_dim}
        formats = make_keys(**sizes), make_values(**sizes)
        keys, values = (
            torch.cat([layout.encode(part) for part in arena.split(_ENCODED_AT_ONCE)])
            for layout, arena in zip(formats, data.arenas(BLOCK), strict=True)
        )
        query, scale = data.queries(1), data.shape.scale
        frames = _choices(data, keys.shape[0], BLOCK)
        return [_over_blocks(query, keys, values, chosen, formats, scale) for chosen in frames]

    return calls


def _over_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    frames: torch.Tensor,
    formats: tuple[BlockFormat, BlockFormat],
    scale: float,
) -> Call:
    arguments = query, keys, values, frames
    chosen: dict[str, Any] = {"k_format": formats[0], "v_format": formats[1], "scale": scale}
    plain = {"softcap": None, "visible": None, "lengths": None}
    return Call(
        lambda: encoded_attention.attend_encoded(*arguments, **chosen),
        lambda: _joined(encoded_reference.attend_encoded(*arguments, **chosen, **plain)),
        frames.numel() * sum(layout.read_bytes for layout in formats) + frames.nbytes,
    )


def _packed(data: Data) -> list[Call]:
    """A sixteenth of the pages of 16 tokens as rows: bytes read, and as many written."""
    keys, values = data.arenas(PAGE)

    def over(frames: torch.Tensor) -> Call:
        rows = torch.empty(frames.numel(), keys[0].numel() + values[0].numel(), dtype=keys.dtype, device=keys.device)

        def truth() -> torch.Tensor:
            rows_reference.pack_pages(keys, values, frames.flatten(), rows)
            return rows

        return Call(lambda: pack_pages.pack_pages(keys, values, frames), truth, 2 * rows.nbytes)

    return [over(frames) for frames in _choices(data, keys.shape[0], PAGE)]


def _choices(data: Data, arena: int, slots: int) -> list[torch.Tensor]:
    """Frames [1, Hk, N / 16], other ones each time."""
    count = max(1, data.tokens // slots // SHARE)
    return [
        torch.stack([torch.randperm(arena)[:count] for _ in range(data.shape.kv_heads)])[None].to(data.device)
        for _ in range(_TURNS)
    ]


def _sums(data: Data) -> list[Call]:
    """The votes of 32 queries over every key."""
    query, keys, scale = data.queries(_WINDOW), data.held.keys, data.shape.scale
    lse = torch.full(query.shape[:3], 12.0, device=data.device)
    return [
        Call(
            lambda: column_sums.column_sums(query, lse, keys, scale=scale),
            lambda: sums_reference.column_sums(query, lse, keys, scale=scale, softcap=None, visible=None),
            keys.nbytes,
        )
    ]


def _summaries(data: Data) -> list[Call]:
    """Bounds of every page of 16 tokens."""
    keys = data.arenas(PAGE).keys
    return [
        Call(
            lambda: page_summaries.page_bounds(keys),
            lambda: torch.cat(summaries_reference.page_bounds(keys)),
            keys.nbytes,
        )
    ]


def _scores(data: Data) -> list[Call]:
    """The bound of every page of 16 tokens for one query."""
    query, keys = data.queries(1), data.held.keys
    low, high = page_summaries.page_bounds(keys.unflatten(2, (-1, PAGE)))
    return [
        Call(
            lambda: page_scores.box_scores(query, low, high, "max"),
            lambda: scores_reference.box_scores(query, low, high, "max"),
            low.nbytes + high.nbytes,
        )
    ]


def _plane_scores(data: Data) -> list[Call]:
    """The bound of every page of 16 tokens for one query, from two bit planes."""
    query, keys = data.queries(1), data.held.keys.unflatten(2, (-1, PAGE))
    low, high = page_summaries.page_bounds(keys)
    planes = page_summaries.page_planes(keys, low, high, bits=_PLANES)
    return [
        Call(
            lambda: page_scores.plane_scores(query, planes, low, high, "max"),
            lambda: scores_reference.plane_scores(query, planes, low, high, "max"),
            planes.nbytes + low.nbytes + high.nbytes,
        )
    ]


def _landmark_scores(data: Data) -> list[Call]:
    """The product with the landmark of every page of 16 tokens for one query."""
    query = data.queries(1)
    landmarks = page_summaries.page_landmarks(data.held.keys.unflatten(2, (-1, PAGE)))
    return [
        Call(
            lambda: page_scores.landmark_scores(query, landmarks, "mean"),
            lambda: scores_reference.landmark_scores(query, landmarks, "mean"),
            landmarks.nbytes,
        )
    ]


def _lowrank(data: Data) -> list[Call]:
    """Keys of a sixteenth of the tokens, in pages of 16, each KV head its own."""
    element, heads, dim = data.held.keys.dtype, data.shape.kv_heads, data.shape.head_dim
    rows = torch.randn(1, data.tokens, _RANK).to(element).to(data.device)
    basis = (torch.randn(1, heads, _RANK, dim) / _RANK**0.5).to(element).to(data.device)
    positions = torch.arange(data.tokens, device=data.device)[None]
    frequencies = 5e5 ** (-torch.arange(dim // 2, device=data.device) / (dim // 2))
    rotation = lowrank_keys.rotary_tables(frequencies, data.tokens)
    tables = (rows, basis, positions)
    table_bytes = rotation.cos[0].nbytes + rotation.sin[0].nbytes + positions.element_size()
    return [
        Call(
            lambda pages=pages: lowrank_keys.lowrank_keys(*tables, pages, rotation, page_tokens=PAGE),  # type: ignore[misc]
            lambda pages=pages: lowrank_reference.lowrank_keys(*tables, pages, rotation, page_tokens=PAGE),  # type: ignore[misc]
            pages.numel() * PAGE * (rows[0, 0].nbytes + table_bytes) + basis.nbytes + pages.nbytes,
        )
        for pages in _choices(data, data.tokens // PAGE, PAGE)
    ]


def _prefix(data: Data) -> list[Call]:
    """One query of each of 16 requests over all but the last keys, which they share, and 64 keys of their own."""
    keys, values = data.arenas(PAGE)
    heads, scale = data.shape.kv_heads, data.shape.scale
    frames = torch.stack([torch.randperm(len(keys) // heads) + head * (len(keys) // heads) for head in range(heads)])
    own, shared = frames.to(data.device).split(
        [_MEMBERS * _OWN // PAGE, (data.tokens - _MEMBERS * _OWN) // PAGE], dim=1
    )
    plan = prefix_attention.plan_prefix(
        [0] * _MEMBERS,
        [shared.shape[1] * PAGE],
        [_OWN] * _MEMBERS,
        layout=data.shape.layout(1).layers[0],
        page_tokens=PAGE,
        device=data.device,
    )
    query = torch.cat([data.queries(1) for _ in range(_MEMBERS)])
    tensors = (query, keys, values, shared, own, plan)
    return [
        Call(
            lambda: prefix_attention.prefix_attention(*tensors, scale=scale),
            lambda: _joined(prefix_reference.prefix_attention(*tensors, scale=scale, softcap=None)),
            keys.nbytes + values.nbytes + frames.nbytes,
        )
    ]


def _best(data: Data) -> list[Call]:
    """The best sixteenth of the pages."""
    scores = torch.randn(1, data.shape.kv_heads, data.tokens // PAGE).to(data.device)
    count = scores.shape[2] // SHARE
    return [
        Call(
            lambda: top_pages.top_pages(scores, count),
            lambda: pages_reference.top_pages(scores, count),
            scores.nbytes,
        )
    ]


def _merge(data: Data) -> list[Call]:
    """Four partials of 512 queries."""
    shape = (1, data.shape.query_heads, _PROMPT)
    parts = [
        Partial(torch.randn(*shape, data.shape.head_dim).to(data.device), torch.randn(shape).to(data.device))
        for _ in range(_PARTS)
    ]
    return [
        Call(
            lambda: merge_partials.merge_partials(parts),
            lambda: _joined(merge_reference.merge_partials(parts)),
            sum(part.out.nbytes + part.lse.nbytes for part in parts),
        )
    ]


def _joined(partial: Partial) -> torch.Tensor:
    return torch.cat([partial.out.flatten(), partial.lse.flatten()])


OPERATORS: Final[Mapping[str, Operator]] = {
    "attention, one run": Operator(folder="gather_attention", calls=_run, cpu_target={"float32": 0.5, "bfloat16": 0.4}),
    "attention, 1/16 of the 16-token pages": Operator(
        folder="gather_attention", calls=_pages(16), cpu_target={"float32": 0.35, "bfloat16": 0.28}
    ),
    "attention, 1/16 of the 64-token pages": Operator(
        folder="gather_attention", calls=_pages(64), cpu_target={"float32": 0.45, "bfloat16": 0.36}
    ),
    "attention, 1/16 of the 64-token blocks, KIVI 4 bit": Operator(
        folder="encoded_attention", calls=_blocks(partial(KiviKeys, group=64), partial(KiviValues, group=64))
    ),
    "attention, 1/16 of the 64-token blocks, KV4": Operator(folder="encoded_attention", calls=_blocks(Kv4, Kv4)),
    "attention, 1/16 of the 64-token blocks, int8": Operator(folder="encoded_attention", calls=_blocks(Int8, Int8)),
    "1/16 of the 16-token pages, packed": Operator(folder="pack_pages", calls=_packed),
    "page scores": Operator(folder="page_scores", calls=_scores),
    "page scores, 2 bit planes": Operator(folder="page_scores", calls=_plane_scores),
    "page scores, landmarks": Operator(folder="page_scores", calls=_landmark_scores),
    # Keys are rounded to the type of the factors: two sums that differ by less than that may be one unit apart.
    "keys from rank 160, 1/16 of the tokens": Operator(folder="lowrank_keys", calls=_lowrank, limit=2**-7),
    "a prefix of 16 requests": Operator(folder="prefix_attention", calls=_prefix),
    "page summaries": Operator(folder="page_summaries", calls=_summaries),
    "column sums, 32 queries": Operator(folder="column_sums", calls=_sums),
    "top pages": Operator(folder="top_pages", calls=_best, typed=False),
    "merge of 4 partials of 512 queries": Operator(folder="merge_partials", calls=_merge, typed=False),
}
