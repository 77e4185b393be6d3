"""Slow and obvious: AdaKV's rule head by head, and one layer whose KV heads are tensors of different lengths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtier.core.draft_tree import DraftTree, TreePath, rows_of_path
from kvtier.testing.dense import reduce_heads
from kvtier.testing.plain_drafts import PlainColumns, PlainDrafts, PlainLine
from kvtier.types import GroupReduce, KVLayout

__all__ = ["AdaKVRule", "DenseHeads", "DenseHeadsSession", "adakv_slots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaKVRule:
    """AdaKV's parameters; ``alpha_percent`` is a hundred times its ``alpha``."""

    window: int
    kernel: int
    keep: int
    alpha_percent: int = 20
    group_reduce: GroupReduce = "mean"


def adakv_slots(votes: Sequence[Sequence[float]], rule: AdaKVRule) -> list[list[int]]:
    """Slots that AdaKV keeps by the votes of each KV head, which may have different numbers of slots.

    The last ``window`` of each head, then the best of each head up to a part of ``keep - window``, then the best of all
    heads, after max-pooling; of equal votes the earlier slot, counted back from the newest, then the lower head.
    """
    window, kernel, keep = rule.window, rule.kernel, rule.keep
    kept: list[set[int]] = []
    others: list[tuple[float, int, int, int]] = []
    for head, given in enumerate(votes):
        ranked = max(0, len(given) - window)
        visible = [*given[:ranked], *[0.0] * (len(given) - ranked)]
        pooled = [max(visible[max(0, slot - kernel // 2) : slot + kernel // 2 + 1]) for slot in range(len(given))]
        best = sorted((-pooled[slot], slot) for slot in range(ranked))
        sure = rule.alpha_percent * (keep - window) // 100
        kept.append({*range(ranked, len(given)), *(slot for _, slot in best[:sure])})
        others += [(vote, slot - len(given), head, slot) for vote, slot in best[sure:]]
    for _, _, head, slot in sorted(others)[: max(0, keep * len(votes) - sum(map(len, kept)))]:
        kept[head].add(slot)
    return [sorted(slots) for slots in kept]


class DenseHeads:
    """The tokens of one row in one layer, KV head by KV head, in the order they came.

    Attributes
    ----------
    keys, values, positions : list of Tensor
        [T_h, Dk], [T_h, Dv] and [T_h] of KV head h.
    """

    def __init__(self, heads: int, group: int, key_dim: int, value_dim: int) -> None:
        self.group = group
        self.keys = [torch.zeros(0, key_dim, dtype=torch.float64) for _ in range(heads)]
        self.values = [torch.zeros(0, value_dim, dtype=torch.float64) for _ in range(heads)]
        self.positions = [torch.zeros(0, dtype=torch.int64) for _ in range(heads)]
        self._voters: list[list[torch.Tensor]] = [[] for _ in range(heads * group)]

    @property
    def counts(self) -> list[int]:
        """Tokens of each head."""
        return [len(positions) for positions in self.positions]

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Add K [Hk, n, Dk], V [Hk, n, Dv] at positions [n] to every head."""
        for head in range(len(self.keys)):
            self.keys[head] = torch.cat([self.keys[head], keys[head].double()])
            self.values[head] = torch.cat([self.values[head], values[head].double()])
            self.positions[head] = torch.cat([self.positions[head], positions])

    def attend(self, query: torch.Tensor, positions: torch.Tensor, *, scale: float, votes: bool) -> torch.Tensor:
        """Outputs [Hq, Tq, Dv] of queries [Hq, Tq, Dk] at positions [Tq]; their weights are remembered if they vote."""
        outputs = []
        for index, queries in enumerate(query.double()):
            head = index // self.group
            hidden = self.positions[head][None] > positions[:, None]
            logits = (queries @ self.keys[head].T * scale).masked_fill(hidden, -torch.inf)
            weights = torch.softmax(logits, dim=1)
            outputs.append(weights @ self.values[head])
            if votes:
                self._voters[index] += list(weights)
        return torch.stack(outputs)

    def evict(self, rule: AdaKVRule) -> None:
        """Leave what AdaKV keeps by the last of the queries that voted since the last eviction."""
        voters, self._voters = self._voters, [[] for _ in self._voters]
        if sum(self.counts) <= rule.keep * len(self.keys):
            return
        votes = []
        for head, count in enumerate(self.counts):
            own = voters[head * self.group : (head + 1) * self.group]
            seen = [
                [torch.nn.functional.pad(one, (0, count - len(one))) for one in some[-rule.window :]] for some in own
            ]
            summed = torch.stack([torch.stack(some).sum(0) for some in seen])
            votes.append(reduce_heads(summed, 1, rule.group_reduce)[0].tolist())
        for head, slots in enumerate(adakv_slots(votes, rule)):
            self._leave(head, torch.tensor(slots))

    def cut(self, newest: int) -> None:
        """Forget the ``newest`` tokens of every head."""
        for head, count in enumerate(self.counts):
            self._leave(head, torch.arange(count - newest))

    def _leave(self, head: int, slots: torch.Tensor) -> None:
        for held in (self.keys, self.values, self.positions):
            held[head] = held[head][slots]


class DenseHeadsSession:
    """A session under AdaKV, to every append of several tokens, which is a prompt, over dense tensors."""

    def __init__(self, layout: KVLayout, rule: AdaKVRule) -> None:
        self.layout, self.rule = layout, rule
        self.layers: list[list[DenseHeads]] = []
        self.length = 0
        self._drafts, self._real = PlainDrafts(), PlainColumns()

    @property
    def rows(self) -> int:
        """Sequences held; 0 before the first append."""
        return len(self.layers[0]) if self.layers else 0

    def append(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        *,
        tree: DraftTree | None = None,
    ) -> None:
        """Add K [B, Hk, Tq, Dk], V [B, Hk, Tq, Dv] at positions [B, Tq]."""
        if tree is not None:
            self._drafts.add(layer, keys, values, positions, tree)
            return
        if not self.layers:
            self.layers = [
                [
                    DenseHeads(one.num_kv_heads, one.num_query_heads // one.num_kv_heads, one.key_dim, one.value_dim)
                    for _ in keys
                ]
                for one in self.layout.layers
            ]
        if layer == 0:
            self.length += keys.shape[2]
            self._real.note([keys.shape[2]] * keys.shape[0])
        for row, held in enumerate(self.layers[layer]):
            held.append(keys[row], values[row], positions[row])

    def attend(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, *, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """Attention [B, Hq, Tq, Dv]; a prompt is evicted behind it."""
        del window
        if self._drafts.pending:

            def behind(row: int, line: PlainLine, own: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
                del level
                held = copy.deepcopy(self.layers[layer][row])
                held.append(line.keys, line.values, line.positions)
                return held.attend(own, line.positions[-1:], scale=scale, votes=False)

            return self._drafts.attend(layer, query, self.layout.layers[layer].value_dim, behind)
        votes = query.shape[2] > 1
        outputs = []
        for row, held in enumerate(self.layers[layer]):
            outputs.append(held.attend(query[row], positions[row], scale=scale, votes=votes))
            if votes:
                held.evict(self.rule)
        return torch.stack(outputs)

    def fork(self) -> DenseHeadsSession:
        """A second session with the same tokens."""
        return copy.deepcopy(self)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self.layers = [[copy.deepcopy(held[row]) for row in rows] for held in self.layers]
        self._real.reorder(rows)

    def crop(self, remove: int) -> None:
        """Forget the newest ``remove`` tokens."""
        counts = self._real.crop(remove)
        for rows in self.layers:
            for held, count in zip(rows, counts, strict=True):
                held.cut(count)
        self.length -= remove

    def accept(self, path: TreePath) -> None:
        """Append the drafted tokens of a path, and forget the others."""
        paths = rows_of_path(path, self.rows)
        for (layer, row), line in self._drafts.take(paths, len(self.layers)).items():
            self.layers[layer][row].append(line.keys, line.values, line.positions)
        lengths = [len(one) for one in paths]
        self._real.note(lengths)
        self.length += max(lengths)

    def record_past(self, record: bool) -> None:
        """No window slides here."""

    def close(self) -> None:
        """Drop everything."""
        self.layers = []
