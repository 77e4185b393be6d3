"""Slow and obvious: any policy in a session, over plain tensors: what it plans is done as written, slot by slot."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from kvtier.core.compose import BoundPolicy
from kvtier.core.draft_tree import DraftTree, TreePath, rows_of_path
from kvtier.core.policy import Need, Phase, PositionMode, Scope, SelectionPolicy
from kvtier.core.stats import QueryMoments, SlotView, Stats
from kvtier.testing.dense import reduce_heads
from kvtier.testing.plain_drafts import PlainColumns, PlainDrafts, PlainLine
from kvtier.testing.plain_slots import PlainSlots, Seen, rotate
from kvtier.types import GroupReduce, KVLayout, Rope

__all__ = ["PlainPolicySession"]


class PlainPolicySession:
    """A session that does what a policy plans, over plain tensors: no pages, no tiers, no slots in place, no kernels.

    Prompts must be announced.

    Parameters
    ----------
    policy : BoundPolicy
        With its budgets.
    """

    def __init__(self, layout: KVLayout, policy: BoundPolicy) -> None:
        self.layout, self.policy = layout, policy
        self.slots: list[list[PlainSlots]] = []
        self.columns = [0] * len(layout.layers)
        self.end: int | None = None
        self.drafts, self.real = PlainDrafts(), PlainColumns()
        self._scale = 1.0

    @property
    def length(self) -> int:
        """Columns that every layer has seen."""
        return min(self.columns)

    @property
    def rows(self) -> int:
        """Sequences held."""
        return len(self.slots)

    def expect(self, tokens: int) -> None:
        """A prompt: the next ``tokens`` columns."""
        self.end = self.length + tokens

    def append(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        *,
        spans: Sequence[slice] | None = None,
        tree: DraftTree | None = None,
    ) -> None:
        """Add keys [B, Hk, Tq, Dk] and values of one layer at positions [B, Tq]; without padding."""
        if tree is not None:
            self.drafts.add(layer, keys, values, positions, tree)
            return
        if layer == 0:
            self.real.note([keys.shape[2]] * keys.shape[0])
        if not self.slots:
            self.slots = [[_empty(self.layout, index) for index in range(len(self.columns))] for _ in keys]
        block = self.layout.block_tokens
        for row, held in enumerate(self.slots):
            one = held[layer]
            one.append(keys[row], values[row], positions[row])
            one.sealed = one.length // block * block
        self.columns[layer] += keys.shape[2]

    def attend(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, *, scale: float, **options: Any
    ) -> torch.Tensor:
        """Attention of queries [B, Hq, Tq, Dk] over what is kept or read -> [B, Hq, Tq, Dv]; then what follows it."""
        decoding = self.end is None or self.columns[layer] > self.end
        window = self.layout.layers[layer].window
        if self.drafts.pending:
            return self._attend_drafts(layer, query, scale, window)
        outs = []
        for row in range(self.rows):
            one = self.slots[row][layer]
            reads = self._read(layer, one, query[row].double()) if decoding and window is None else None
            weights = self._weights(layer, one, query[row].double(), positions[row], scale, reads)
            group = query.shape[1] // one.keys.shape[0]
            outs.append(weights @ one.values.repeat_interleave(group, 0))
            if window is None:
                self._after(one, weights, query[row], positions[row], scale, decoding=decoding)
        if self.columns[layer] == self.end and window is None:
            self._end_prompt(layer)
        return torch.stack(outs).to(query.dtype)

    def fork(self) -> PlainPolicySession:
        """A second session with the same contents."""
        return copy.deepcopy(self)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self.slots = [copy.deepcopy(self.slots[row]) for row in rows]
        self.real.reorder(rows)

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` columns, none of which was evicted or merged."""
        for row, count in zip(self.slots, self.real.crop(remove), strict=True):
            for one in row:
                one.take(torch.arange(one.length - count).expand(one.keys.shape[0], -1))
                one.sealed = one.length // self.layout.block_tokens * self.layout.block_tokens
                one.seen = None
        self.columns = [columns - remove for columns in self.columns]
        self.end = None if self.end is None else min(self.end, self.length)

    def accept(self, path: TreePath) -> None:
        """Append the drafted tokens of a path one by one, each followed by its step's eviction."""
        paths = rows_of_path(path, self.rows)
        for (layer, row), line in self.drafts.take(paths, len(self.columns)).items():
            one = self.slots[row][layer]
            for token in range(line.positions.numel()):
                at = slice(token, token + 1)
                one.append(line.keys[:, at], line.values[:, at], line.positions[at])
                one.sealed = one.length // self.layout.block_tokens * self.layout.block_tokens
                if one.opened and line.queries is not None:
                    query, scale = line.queries[:, at], self._scale
                    weights = self._weights(layer, one, query.double(), line.positions[at], scale, None)
                    self._after(one, weights, query, line.positions[at], scale, decoding=True)
        lengths = [len(one) for one in paths]
        self.real.note(lengths)
        self.columns = [columns + max(lengths) for columns in self.columns]

    def close(self) -> None:
        """Drop everything."""
        self.slots = []

    def _attend_drafts(self, layer: int, query: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """Each drafted token's query over what is kept or read of the past, and over the line that it ends."""
        self._scale = scale

        def behind(row: int, line: PlainLine, own: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            held = self.slots[row][layer]
            one, beside = copy.deepcopy(held), self.drafts.all(layer, row).positions.numel()
            one.append(line.keys, line.values, line.positions)
            reads = None if window is not None else self._read(layer, held, level.double(), beside=beside)
            if reads is not None:
                reads = torch.nn.functional.pad(reads, (0, line.positions.numel()), value=True)
            weights = self._weights(layer, one, own.double(), line.positions[-1:], scale, reads)
            return (weights @ one.values.repeat_interleave(own.shape[0] // one.keys.shape[0], 0)).to(query.dtype)

        return self.drafts.attend(layer, query, self.layout.layers[layer].value_dim, behind)

    def _weights(
        self,
        layer: int,
        one: PlainSlots,
        query: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        reads: torch.Tensor | None,
    ) -> torch.Tensor:
        """Softmax weights [Hq, Tq, T] of queries [Hq, Tq, Dk], on the slots [Hk, T] that are read."""
        window = self.layout.layers[layer].window
        group = query.shape[0] // one.keys.shape[0]
        visible = one.positions[:, None, :] <= positions[None, :, None]
        if window is not None:
            visible = visible & (one.positions[:, None, :] > positions[None, :, None] - window)
        if reads is not None:
            visible = visible & reads[:, None, :]
        keys, selection = one.keys, self.policy.selection
        compact = selection is not None and selection.position_mode is PositionMode.COMPACT
        rope = self.layout.layers[layer].rope
        if one.opened and compact and rope is not None:
            place = torch.arange(one.length).expand(one.positions.shape)
            keys = rotate(rope, rotate(rope, keys, -one.positions), place)
            own = torch.searchsorted(one.positions[0].contiguous(), positions.contiguous())
            query = rotate(rope, rotate(rope, query, -positions), own)
        logits = query @ keys.repeat_interleave(group, 0).mT * scale
        return torch.softmax(logits.masked_fill(~visible.repeat_interleave(group, 0), -torch.inf), dim=2)

    def _read(self, layer: int, one: PlainSlots, query: torch.Tensor, *, beside: int = 0) -> torch.Tensor:
        """Slots [Hk, T] that a decode step reads: the tail, and the pages that the policy chooses."""
        readable = torch.ones(one.keys.shape[:2], dtype=torch.bool)
        retrieval, read, page = self.policy.retrieval, self.policy.read, self.layout.page_tokens
        if retrieval is None or read is None or layer < retrieval.dense_layers:
            return readable
        count = max(0, read - beside - (one.length - one.sealed)) // page
        if count * page >= one.sealed:
            return readable
        made = retrieval.sketch(one.keys[:, : one.sealed].unflatten(1, (-1, page)))
        sketch = {name: part[None] for name, part in made.items()}
        chosen = retrieval.choose(retrieval.rank(query[None], sketch), count).pages[0]
        readable[:, : one.sealed] = False
        for head, columns in enumerate(chosen.tolist()):
            for column in columns:
                readable[head, column * page : (column + 1) * page] = True
        return readable

    def _after(
        self,
        one: PlainSlots,
        weights: torch.Tensor,
        query: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        *,
        decoding: bool,
    ) -> None:
        """Remember what a prompt's queries saw; after a step vote and evict."""
        selection = self.policy.selection
        if selection is None:
            return
        if not decoding:
            one.seen = Seen(scale=scale) if one.seen is None else one.seen
            one.seen.weights += list(weights.unbind(1))
            one.seen.queries += list(query.unbind(1))
            one.seen.positions += positions.tolist()
        elif one.opened:
            if selection.needs:
                one.votes = one.votes + weights.sum(1)
            self._evict_slots(one, selection, weights.sum(1))

    def _end_prompt(self, layer: int) -> None:
        """Evict this layer, or all of them once the last has seen the prompt."""
        selection, keep = self.policy.selection, self.policy.keep
        if selection is None or keep is None:
            return
        full = [index for index, one in enumerate(self.layout.layers) if one.window is None]
        if selection.scope is Scope.MODEL and layer != full[-1]:
            return
        for row in self.slots:
            budgets = [keep[index] for index in full]
            if selection.scope is Scope.MODEL:
                sums = [seen.votes(None, row[index].length) for index in full if (seen := row[index].seen)]
                budgets = list(selection.share(tuple(budgets), sums))
            for index, budget in zip(full, budgets, strict=True):
                if selection.scope is Scope.MODEL or index == layer:
                    self._evict(row[index], selection, budget, self.layout.layers[index].rope)

    def _evict(self, one: PlainSlots, selection: SelectionPolicy, budget: int, rope: Rope | None) -> None:
        seen, one.seen = one.seen, None
        decodes = selection.phase is Phase.DECODE
        if seen is None or (one.length <= budget and not decodes):
            return
        window = seen.votes(selection.window_queries, one.length) if selection.window_queries else None
        sums = seen.votes(None, one.length) if Need.COLUMN_SUMS in selection.needs else None
        one.budget = budget
        if one.opened:
            one.votes = one.votes if sums is None else one.votes + sums
            self._evict_slots(one, selection, window)
            return
        one.votes = torch.zeros_like(one.votes) if sums is None else sums
        self._plan(one, selection, window, sums, _moments(seen, selection, rope))
        one.opened = decodes
        one.sealed = one.length // self.layout.block_tokens * self.layout.block_tokens

    def _evict_slots(self, one: PlainSlots, selection: SelectionPolicy, window: torch.Tensor | None) -> None:
        if one.length > one.budget:
            self._plan(one, selection, window, one.votes, None)

    def _plan(
        self,
        one: PlainSlots,
        selection: SelectionPolicy,
        window: torch.Tensor | None,
        sums: torch.Tensor | None,
        moments: QueryMoments | None,
    ) -> None:
        """Score, select, merge and take, as the policy says."""
        heads = one.keys.shape[0]
        how: GroupReduce = selection.group_reduce if hasattr(selection, "group_reduce") else "mean"
        positions = one.positions[None].clone()
        view = SlotView(
            positions=positions,
            protected=selection.protected(positions),
            keys=one.keys[None].clone(),
            value_norms=one.values.norm(dim=-1)[None].float(),
            memory=one.memory,
        )
        votes = [None if part is None else reduce_heads(part, heads, how)[None] for part in (window, sums)]
        stats = Stats(window_attention=votes[0], column_sums=votes[1], query_moments=moments)
        plan = selection.select(selection.score(view, stats), view, one.budget)
        merge = selection.merge(view, plan)
        if merge is not None:
            one.merge(merge)
        one.memory = None if merge is None else merge.memory
        one.take(plan.keep[0])


def _moments(seen: Seen, selection: SelectionPolicy, rope: Rope | None) -> QueryMoments | None:
    """Mean and covariance of all queries of a prompt, turned back one by one."""
    if Need.QUERY_MOMENTS not in selection.needs or rope is None:
        return None
    taken = [place for place, position in enumerate(seen.positions) if position >= selection.skipped_queries]
    plain = torch.stack([seen.queries[place].double() for place in taken], dim=1)
    plain[..., : 2 * len(rope.frequencies)] /= rope.scaling
    plain = rotate(rope, plain, -torch.tensor([seen.positions[place] for place in taken]))
    covariance = torch.stack([torch.cov(head.T, correction=0) for head in plain])
    return QueryMoments(plain.mean(1)[None].float(), covariance[None].float(), rope, seen.scale)


def _empty(layout: KVLayout, index: int) -> PlainSlots:
    shape = layout.layers[index]
    heads = shape.num_kv_heads
    return PlainSlots(
        keys=torch.zeros(heads, 0, shape.key_dim, dtype=torch.float64),
        values=torch.zeros(heads, 0, shape.value_dim, dtype=torch.float64),
        positions=torch.zeros(heads, 0, dtype=torch.int64),
        votes=torch.zeros(shape.num_query_heads, 0, dtype=torch.float64),
    )
