"""Which keys which queries may see, by blocks: most blocks are skipped or need no mask, masks exist in between."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch

from kvtier.types import Visibility

__all__ = ["Rows", "Span", "all_seen", "batch_row", "causal_plan", "fits", "hidden_pairs", "plan_blocks", "whole_plan"]

Kind = Literal["visible", "causal", "masked"]

_UNSEEN, _PARTLY, _SEEN = 0, 1, 2


class Span(NamedTuple):
    """A range of keys as one block of queries sees it.

    ``"visible"``: every key by every query. ``"causal"``: key ``start + j`` by query i of the block when j <= i.
    ``"masked"``: as ``hidden_pairs`` says.
    """

    start: int
    stop: int
    kind: Kind

    def pieces(self, limit: int) -> list[Span]:
        """The same keys in ranges of at most ``limit``; a causal span stays whole."""
        if self.kind == "causal" or self.stop - self.start <= limit:
            return [self]
        return [Span(at, min(at + limit, self.stop), self.kind) for at in range(self.start, self.stop, limit)]


class Rows(NamedTuple):
    """A block of queries and the spans of keys that it sees any of."""

    start: int
    stop: int
    spans: list[Span]


def fits(visible: Visibility, q: torch.Tensor, kv_heads: int, keys: int) -> bool:
    """Whether the shapes of the positions are those of q [B, Hq, Tq, Dk] and of ``keys`` keys of each KV head."""
    q_pos, k_pos = visible.q_pos, visible.k_pos
    return (
        q_pos.shape == (q.shape[0], q.shape[2])
        and k_pos.dim() == 3
        and k_pos.shape[0] == q.shape[0]
        and k_pos.shape[1] in {1, kv_heads}
        and k_pos.shape[2] == keys
    )


def batch_row(visible: Visibility | None, row: slice) -> Visibility | None:
    """The positions of some batch rows alone."""
    return None if visible is None else Visibility(visible.q_pos[row], visible.k_pos[row], visible.window)


def all_seen(visible: Visibility) -> bool:
    """Whether every query sees every key, told by the least and greatest positions; False when there are none."""
    if not visible.q_pos.numel() or not visible.k_pos.numel():
        return False
    q_low, q_high = (int(bound) for bound in visible.q_pos.aminmax())
    k_low, k_high = (int(bound) for bound in visible.k_pos.aminmax())
    return k_high <= q_low and (visible.window is None or k_low > q_high - visible.window)


def whole_plan(queries: int, keys: int, row_block: int) -> list[Rows]:
    """Every key visible to every query."""
    spans = [Span(0, keys, "visible")]
    return [Rows(at, min(at + row_block, queries), spans) for at in range(0, queries, row_block)]


def plan_blocks(visible: Visibility, row_block: int, key_block: int) -> list[Rows]:
    """Spans from the least and greatest position of each block; right for positions in any order.

    A window makes it linear: ``O(Tq * window)`` pairs are ever looked at when keys come in order of position.
    """
    queries, keys = visible.q_pos.shape[-1], visible.k_pos.shape[-1]
    if queries <= row_block and keys <= key_block:
        return [Rows(0, queries, [Span(0, keys, "masked")])]
    states = _block_states(visible, row_block, key_block)
    return [
        Rows(at, min(at + row_block, queries), _runs(states[index], key_block, keys))
        for index, at in enumerate(range(0, queries, row_block))
    ]


def causal_plan(visible: Visibility, row_block: int) -> list[Rows] | None:
    """Spans of a prompt chunk over its own keys and any past ones, or None when that is not what the positions are.

    Required: no window that hides anything; queries at consecutive positions; keys that are first, in any order, the
    past (before every query) and then consecutive positions. Then no mask is needed at all.
    """
    shape = _chunk_shape(visible)
    if shape is None:
        return None
    past, late = shape
    queries, keys = visible.q_pos.shape[-1], visible.k_pos.shape[-1]
    edges = sorted({0, min(late, queries), *range(late, queries, row_block), queries})
    plan = []
    for start, stop in itertools.pairwise(edges):
        seen = min(past + max(0, start - late), keys)
        spans = [Span(0, seen, "visible")] if seen else []
        if start >= late and seen < keys:
            spans.append(Span(seen, min(seen + stop - start, keys), "causal"))
        plan.append(Rows(start, stop, spans))
    return plan


def hidden_pairs(visible: Visibility, rows: slice, keys: slice, folded_heads: int) -> torch.Tensor:
    """Bool [B * Hk or 1, rows, keys], True where a query may not see a key."""
    q_pos = visible.q_pos[:, None, rows, None]
    k_pos = visible.k_pos[:, :, None, keys]
    hidden = k_pos > q_pos
    if visible.window is not None:
        hidden |= k_pos <= q_pos - visible.window
    if hidden.shape[0] == 1:
        return hidden[0]
    batch = hidden.shape[0]
    return hidden.expand(batch, folded_heads // batch, -1, -1).flatten(0, 1)


def _chunk_shape(visible: Visibility) -> tuple[int, int] | None:
    """(past keys, queries before the first own key) of a prompt chunk, or None when it is none."""
    q_pos, k_pos = visible.q_pos, visible.k_pos
    first, last = q_pos[:, :1], q_pos[:, -1:]
    if visible.window is not None and bool((k_pos.amin((1, 2)) <= last[:, 0] - visible.window).any()):
        return None
    if not bool((q_pos.diff() == 1).all()):
        return None
    before = k_pos < first[:, None]
    past = int(before[0, 0].sum())
    own = k_pos[:, :, past:]
    if not bool(before[:, :, :past].all()) or bool(before[:, :, past:].any()) or not bool((own.diff() == 1).all()):
        return None
    if own.shape[-1] == 0:
        return past, q_pos.shape[-1]
    late = own[:, :, 0] - first
    return (past, int(late[0, 0])) if bool((late == late[0, 0]).all()) else None


def _block_states(visible: Visibility, row_block: int, key_block: int) -> list[list[int]]:
    """Of each block of queries and block of keys: unseen, partly seen or seen, whatever the batch row and head."""
    q_low, q_high = _bounds(visible.q_pos.unsqueeze(1), row_block)
    k_low, k_high = _bounds(visible.k_pos, key_block)
    unseen = k_low > q_high[:, None]
    seen = k_high <= q_low[:, None]
    if visible.window is not None:
        unseen |= k_high <= q_low[:, None] - visible.window
        seen &= k_low > q_high[:, None] - visible.window
    states: list[list[int]] = torch.where(unseen, _UNSEEN, torch.where(seen, _SEEN, _PARTLY)).tolist()
    return states


def _bounds(positions: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest of positions [B, h, n] in each block of n."""
    low, high = (
        (positions[0, 0],) * 2 if positions[..., 0].numel() == 1 else torch.aminmax(positions.flatten(0, 1), dim=0)
    )
    short = -low.shape[0] % block
    if short:
        low = torch.cat([low, low[-1:].expand(short)])
        high = torch.cat([high, high[-1:].expand(short)])
    return low.view(-1, block).amin(1), high.view(-1, block).amax(1)


def _runs(states: list[int], key_block: int, keys: int) -> list[Span]:
    spans: list[Span] = []
    for index, state in enumerate(states):
        if state == _UNSEEN:
            continue
        kind: Kind = "visible" if state == _SEEN else "masked"
        start, stop = index * key_block, min((index + 1) * key_block, keys)
        if spans and spans[-1].stop == start and spans[-1].kind == kind:
            start = spans.pop().start
        spans.append(Span(start, stop, kind))
    return spans
