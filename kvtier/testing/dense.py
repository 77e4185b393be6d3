"""Slow and obvious: one layer as dense tensors whose heads may keep different tokens, and the plans of two papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.types import GroupReduce

__all__ = ["DenseRow", "box_bound", "quest_pages", "reduce_heads", "snapkv_slots"]


class DenseRow:
    """The tokens of one row in one layer, in the order they came.

    Attributes
    ----------
    keys, values, positions : Tensor
        [Hk, T, Dk], [Hk, T, Dv] and [Hk, T].
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int) -> None:
        self.keys = torch.zeros(heads, 0, key_dim, dtype=torch.float64)
        self.values = torch.zeros(heads, 0, value_dim, dtype=torch.float64)
        self.positions = torch.zeros(heads, 0, dtype=torch.int64)

    @property
    def length(self) -> int:
        """Tokens that each head keeps."""
        return self.keys.shape[1]

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Add K [Hk, n, Dk], V [Hk, n, Dv] at positions [n]."""
        self.keys = torch.cat([self.keys, keys.double()], dim=1)
        self.values = torch.cat([self.values, values.double()], dim=1)
        self.positions = torch.cat([self.positions, positions.expand(self.keys.shape[0], -1)], dim=1)

    def weights(
        self,
        query: torch.Tensor,
        positions: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sink: torch.Tensor | None = None,
        window: int | None = None,
        readable: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax weights [Hq, Tq, T] of queries [Hq, Tq, Dk] at positions [Tq], over slots ``readable`` [Hk, T]."""
        group = query.shape[0] // self.keys.shape[0]
        logits = query.double() @ self.keys.repeat_interleave(group, 0).transpose(1, 2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        visible = self.positions[:, None, :] <= positions[None, :, None]
        if window is not None:
            visible = visible & (self.positions[:, None, :] > positions[None, :, None] - window)
        if readable is not None:
            visible = visible & readable[:, None, :]
        logits = logits.masked_fill(~visible.repeat_interleave(group, 0), -torch.inf)
        if sink is not None:
            logits = torch.cat([logits, sink.double()[:, None, None].expand(-1, query.shape[1], 1)], dim=2)
        return torch.softmax(logits, dim=2)[..., : self.length]

    def attend(self, weights: torch.Tensor) -> torch.Tensor:
        """Values [Hq, Tq, Dv] under these weights [Hq, Tq, T]."""
        return weights @ self.values.repeat_interleave(weights.shape[0] // self.values.shape[0], 0)

    def keep(self, slots: Sequence[Sequence[int]]) -> None:
        """Forget all but ``slots[h]`` of head h."""
        index = torch.tensor(slots)[..., None]
        self.keys = self.keys.gather(1, index.expand(-1, -1, self.keys.shape[2]))
        self.values = self.values.gather(1, index.expand(-1, -1, self.values.shape[2]))
        self.positions = self.positions.gather(1, index[..., 0])


def reduce_heads(values: torch.Tensor, heads: int, how: GroupReduce) -> torch.Tensor:
    """Query heads [Hq, ...] to KV heads [Hk, ...], head by head."""
    group = values.shape[0] // heads
    rules = {"mean": lambda one: one.mean(0), "max": lambda one: one.amax(0), "sum": lambda one: one.sum(0)}
    return torch.stack([rules[how](values[head * group : (head + 1) * group]) for head in range(heads)])


def snapkv_slots(votes: torch.Tensor, *, window: int, kernel: int, keep: int) -> list[list[int]]:
    """Slots that SnapKV keeps by votes [Hk, T]: the last ``window``, then the best after max-pooling, earlier first."""
    plan = []
    for head in votes.tolist():
        ranked = max(0, len(head) - window)
        open_votes = head[:ranked] + [0.0] * (len(head) - ranked)
        pooled = [max(open_votes[max(0, slot - kernel // 2) : slot + kernel // 2 + 1]) for slot in range(len(head))]
        best = sorted(range(ranked), key=lambda slot: (-pooled[slot], slot))
        newest = list(range(ranked, len(head)))[-keep:]
        plan.append(sorted(best[: keep - len(newest)] + newest))
    return plan


def box_bound(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Largest q.k of any key within the box [..., D]: channel by channel, its better corner."""
    return torch.maximum(query * low, query * high).sum(-1)


def quest_pages(query: torch.Tensor, pages: torch.Tensor, *, count: int, how: GroupReduce) -> list[list[int]]:
    """Pages that Quest reads for queries [Hq, Tq, D] out of keys [Hk, N, P, D]: the ``count`` best box bounds."""
    group = query.shape[0] // pages.shape[0]
    low, high = pages.amin(2).repeat_interleave(group, 0), pages.amax(2).repeat_interleave(group, 0)
    bounds = box_bound(query[:, :, None], low[:, None], high[:, None])
    scores = reduce_heads(bounds, pages.shape[0], how).amax(1).tolist()
    return [sorted(sorted(range(len(head)), key=lambda page: -head[page])[:count]) for head in scores]
