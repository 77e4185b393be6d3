"""Which keys each request of a batch with shared prefixes attends to; made once per step, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtier.errors import InputError
from kvtier.kernels.prefix_attention.programs import Programs, Span, cut
from kvtier.types import LayerLayout

__all__ = ["PrefixPlan", "plan_prefix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPlan:
    """A batch of requests and what they share.

    Parameters
    ----------
    layout : LayerLayout
        Heads and dimensions of the layers.
    page_tokens : int
        Slots P of a page.
    queries : int
        Queries Tq of each request, its last tokens.
    members : tuple of tuple of int
        The requests of each group.
    prefixes : tuple of Span
        Where the keys that the members of a group share lie among all prefix pages.
    owns : tuple of Span
        Where the keys of each request alone lie among all own pages.
    programs : Programs
        The batch as a GPU runs it.
    """

    layout: LayerLayout
    page_tokens: int
    queries: int
    members: tuple[tuple[int, ...], ...]
    prefixes: tuple[Span, ...]
    owns: tuple[Span, ...]
    programs: Programs

    @property
    def prefix_pages(self) -> int:
        """Pages of all prefixes together."""
        return self._end(self.prefixes)

    @property
    def own_pages(self) -> int:
        """Pages of all requests alone together."""
        return self._end(self.owns)

    def pages(self, span: Span) -> int:
        """Pages of one list, of which the last may be partly filled."""
        return -(-span.length // self.page_tokens)

    def _end(self, spans: tuple[Span, ...]) -> int:
        return spans[-1].page + self.pages(spans[-1]) if spans else 0


def plan_prefix(
    groups: Sequence[int],
    prefix_lengths: Sequence[int],
    own_lengths: Sequence[int],
    *,
    layout: LayerLayout,
    page_tokens: int,
    device: torch.device | str,
    queries: int = 1,
) -> PrefixPlan:
    """Plan attention of requests that share prefixes, for every layer of one step.

    Parameters
    ----------
    groups : sequence of int
        [B]: the group of each request, an index into ``prefix_lengths``. A group may have any number of members, none
        included, and its members may lie anywhere in the batch.
    prefix_lengths : sequence of int
        Tokens that the members of each group share; 0 where they share nothing.
    own_lengths : sequence of int
        [B]: tokens that each request has alone, behind its prefix, those of its queries included.
    layout : LayerLayout
        Heads, dimensions and type of the layers, which must see everything.
    page_tokens : int
        Slots P of a page.
    device : device
        Where the tensors will be.
    queries : int
        Queries of each request: its last ``queries`` tokens, each of which sees those before it and itself.

    Raises
    ------
    InputError
        When the lengths do not fit together, or the layers have a window.
    """
    _check(groups, prefix_lengths, own_lengths, page_tokens, queries)
    if layout.window is not None:
        raise InputError(
            f"prefix_attention serves layers that see everything, got a window of {layout.window}; use attend_pages"
        )
    members: list[list[int]] = [[] for _ in prefix_lengths]
    for request, group in enumerate(groups):
        members[group].append(request)
    named = tuple(map(tuple, members))
    prefixes, owns = _end_to_end(prefix_lengths, page_tokens), _end_to_end(own_lengths, page_tokens)
    return PrefixPlan(
        layout=layout,
        page_tokens=page_tokens,
        queries=queries,
        members=named,
        prefixes=prefixes,
        owns=owns,
        programs=cut(named, prefixes, owns, queries, layout, torch.device(device)),
    )


def _end_to_end(lengths: Sequence[int], page_tokens: int) -> tuple[Span, ...]:
    """Lists of whole pages, one behind the other."""
    spans, page = [], 0
    for length in lengths:
        spans.append(Span(page, length))
        page += -(-length // page_tokens)
    return tuple(spans)


def _check(
    groups: Sequence[int], prefix_lengths: Sequence[int], own_lengths: Sequence[int], page_tokens: int, queries: int
) -> None:
    if not (
        len(groups) == len(own_lengths)
        and all(0 <= group < len(prefix_lengths) for group in groups)
        and min((0, *prefix_lengths, *own_lengths)) == 0
        and page_tokens >= 1
        and queries >= 1
    ):
        raise InputError(
            "plan_prefix needs for each request a group of prefix_lengths and an own length, no length below 0, and "
            f"page_tokens and queries of at least 1, got groups {list(groups)}, prefix_lengths {list(prefix_lengths)}, "
            f"own_lengths {list(own_lengths)}, page_tokens {page_tokens} and queries {queries}"
        )
