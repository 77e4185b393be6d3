"""Every operator under kernels/ as something to time: what one call reads, and the answer that the reference gives.

One more operator is a function and one line of ``OPERATORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from benchmarks.workload import KV, Shape
from kvtier.kernels import column_sums, gather_attention, merge_partials, page_scores, page_summaries, top_pages
from kvtier.kernels.column_sums import reference as sums_reference
from kvtier.kernels.gather_attention import reference as attention_reference
from kvtier.kernels.merge_partials import reference as merge_reference
from kvtier.kernels.page_scores import reference as scores_reference
from kvtier.kernels.page_summaries import reference as summaries_reference
from kvtier.kernels.top_pages import reference as pages_reference
from kvtier.types import Partial

__all__ = ["OPERATORS", "SHARE", "Call", "Data", "Operator"]

SHARE: Final = 16
"""Of the pages, one of so many is read by what reads a choice of them."""
PAGE: Final = 16
_WINDOW: Final = 32
_TURNS: Final = 4
_PARTS: Final = 4
_PROMPT: Final = 512


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
    """

    folder: str
    calls: Callable[[Data], list[Call]]
    typed: bool = True
    cpu_target: Mapping[str, float] | None = None


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
    "page scores": Operator(folder="page_scores", calls=_scores),
    "page summaries": Operator(folder="page_summaries", calls=_summaries),
    "column sums, 32 queries": Operator(folder="column_sums", calls=_sums),
    "top pages": Operator(folder="top_pages", calls=_best, typed=False),
    "merge of 4 partials of 512 queries": Operator(folder="merge_partials", calls=_merge, typed=False),
}
