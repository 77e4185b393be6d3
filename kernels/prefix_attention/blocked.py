"""Attention over shared prefixes by the operator for pages: a prefix for all its members at once, then their own keys.

Requests whose own parts are equally long go together, too.
"""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention import attend_pages, attend_run
from kvtier.kernels.heads import accumulation_dtype
from kvtier.kernels.merge_partials import empty_partial, merge_partials
from kvtier.kernels.prefix_attention.plan import PrefixPlan
from kvtier.types import Partial, Visibility

__all__ = ["prefix_attention"]


def prefix_attention(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    prefix_frames: torch.Tensor,
    own_frames: torch.Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Partials over the prefixes and over the own keys, merged once."""
    lists = _Lists(k_arena, v_arena, scale, softcap)
    wide = q.to(accumulation_dtype(q, k_arena, v_arena))
    shared, alone = empty_partial(wide, v_arena.shape[2]), empty_partial(wide, v_arena.shape[2])
    for members, prefix in zip(plan.members, plan.prefixes, strict=True):
        if members and prefix.length:
            frames = prefix_frames[None, :, prefix.page : prefix.page + -(-prefix.length // plan.page_tokens)]
            # [M, Hq, Tq, D] to [1, Hq, M * Tq, D]: the queries of all members are those of one request.
            packed = q[list(members)].transpose(0, 1).flatten(1, 2)[None]
            part = lists.attend(packed, frames, prefix.length, queries=None)
            for whole, piece in zip(shared, part, strict=True):
                whole[list(members)] = piece[0].unflatten(1, (len(members), -1)).transpose(0, 1)
    for length, requests in _by_length(plan).items():
        pages = -(-length // plan.page_tokens)
        starts = [plan.owns[request].page for request in requests]
        frames = torch.stack([own_frames[:, page : page + pages] for page in starts])
        part = lists.attend(q[requests], frames, length, queries=plan.queries)
        for whole, piece in zip(alone, part, strict=True):
            whole[requests] = piece
    return merge_partials([shared, alone])


def _by_length(plan: PrefixPlan) -> dict[int, list[int]]:
    """Requests by the length of their own keys, without those that have none."""
    found: dict[int, list[int]] = {}
    for request, span in enumerate(plan.owns):
        if span.length:
            found.setdefault(span.length, []).append(request)
    return found


class _Lists:
    """Arenas, and how lists of their pages are attended."""

    def __init__(self, k_arena: torch.Tensor, v_arena: torch.Tensor, scale: float, softcap: float | None) -> None:
        self.k_arena = k_arena
        self.v_arena = v_arena
        self.scale = scale
        self.softcap = softcap

    def attend(self, q: torch.Tensor, frames: torch.Tensor, length: int, queries: int | None) -> Partial:
        """Attention of q [b, Hq, T, Dk] over the first ``length`` tokens of pages [b, Hk, N].

        ``queries`` are the last tokens of the list and see what comes before them; None sees all.
        """
        slots = self.k_arena.shape[1]
        whole = length // slots
        parts: list[Partial] = []
        if whole:
            visible = self._visible(q, 0, whole * slots, length, queries)
            parts.append(
                attend_pages(
                    q,
                    self.k_arena,
                    self.v_arena,
                    frames[:, :, :whole],
                    scale=self.scale,
                    softcap=self.softcap,
                    visible=visible,
                )
            )
        if length % slots:
            # What lies behind the last token may be anything, NaN included, so it is not read.
            k, v = (arena[:, : length % slots][frames[:, :, whole]] for arena in (self.k_arena, self.v_arena))
            visible = self._visible(q, whole * slots, length, length, queries)
            parts.append(attend_run(q, k, v, scale=self.scale, softcap=self.softcap, visible=visible))
        return merge_partials(parts)

    @staticmethod
    def _visible(q: torch.Tensor, start: int, stop: int, length: int, queries: int | None) -> Visibility | None:
        if queries in (None, 1):
            return None
        q_pos = torch.arange(length - q.shape[2], length, device=q.device)
        k_pos = torch.arange(start, stop, device=q.device)
        return Visibility(q_pos.expand(q.shape[0], -1), k_pos.expand(q.shape[0], 1, -1))
