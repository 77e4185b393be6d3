"""Slow and obvious: SnapKV, Quest, or one after the other, over dense tensors; what a session under them must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtier.testing.dense import DenseRow, quest_pages, reduce_heads, snapkv_slots
from kvtier.testing.steps import SCALE, Step
from kvtier.types import GroupReduce, KVLayout

__all__ = ["DensePolicies", "Evicting", "Reading"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicting:
    """SnapKV's parameters."""

    window: int
    kernel: int
    keep: int
    group_reduce: GroupReduce = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Quest's parameters."""

    read: int
    dense_layers: int
    group_reduce: GroupReduce = "max"


class DensePolicies:
    """One row of a session, layer by layer.

    Attributes
    ----------
    layers : list of DenseRow
    pages_read : int
        Pages that decode steps read per KV head, summed over layers and steps.
    read_at_most : int
        Most tokens that a step read per KV head in a layer where pages were chosen; 0 while none were.
    """

    def __init__(self, layout: KVLayout, evicting: Evicting | None = None, reading: Reading | None = None) -> None:
        self.layout = layout
        self.evicting, self.reading = evicting, reading
        self.layers = [DenseRow(one.num_kv_heads, one.key_dim, one.value_dim) for one in layout.layers]
        self.sealed = [0] * len(layout.layers)
        self.pages_read = self.read_at_most = 0
        self._voters: list[list[torch.Tensor]] = [[] for _ in layout.layers]

    def run(
        self,
        step: Step,
        row: int,
        *,
        decoding: bool,
        ends_prompt: bool,
        softcap: float | None = None,
        sink: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Append and attend row ``row`` of a step in every layer; outputs [Hq, Tq, Dv] by layer."""
        span = slice(None) if step.spans is None else step.spans[row]
        positions = step.positions[row, span]
        outputs = []
        for index, held in enumerate(self.layers):
            held.append(step.keys[index][row, :, span], step.values[index][row, :, span], positions)
            self.sealed[index] = held.length // self.layout.block_tokens * self.layout.block_tokens
            query = step.queries[index][row, :, span].double()
            window = self.layout.layers[index].window
            readable = self._readable(index, query) if decoding and window is None else None
            weights = held.weights(
                query, positions, scale=SCALE, softcap=softcap, sink=sink, window=window, readable=readable
            )
            outputs.append(held.attend(weights))
            if not decoding and self.evicting is not None and window is None:
                self._vote(index, weights)
                if ends_prompt:
                    self._evict(index, self.evicting)
        return outputs

    def _readable(self, index: int, query: torch.Tensor) -> torch.Tensor:
        """Slots [Hk, T] that a decode step reads: the tail and the chosen pages."""
        held, page = self.layers[index], self.layout.page_tokens
        readable = torch.ones_like(held.positions, dtype=torch.bool)
        reading, sealed = self.reading, self.sealed[index]
        dense = reading is None or index < reading.dense_layers
        count = sealed // page if dense or reading is None else (reading.read - (held.length - sealed)) // page
        self.pages_read += min(count, sealed // page)
        if reading is None or count * page >= sealed:
            return readable
        pages = held.keys[:, :sealed].unflatten(1, (-1, page))
        self.read_at_most = max(self.read_at_most, count * page + held.length - sealed)
        readable[:, :sealed] = False
        for head, columns in enumerate(quest_pages(query, pages, count=count, how=reading.group_reduce)):
            for column in columns:
                readable[head, column * page : (column + 1) * page] = True
        return readable

    def _vote(self, index: int, weights: torch.Tensor) -> None:
        """Remember the weights of each prompt query over the slots there were; the last ``window`` of them vote."""
        self._voters[index] += list(weights.unbind(1))

    def _evict(self, index: int, evicting: Evicting) -> None:
        held, voters = self.layers[index], self._voters[index][-evicting.window :]
        self._voters[index] = []
        if held.length <= evicting.keep:
            return
        votes = sum(torch.nn.functional.pad(one, (0, held.length - one.shape[1])) for one in voters)
        if not isinstance(votes, torch.Tensor):
            raise TypeError("a prompt ended that had no query")
        reduced = reduce_heads(votes, held.keys.shape[0], evicting.group_reduce)
        held.keep(snapkv_slots(reduced, window=evicting.window, kernel=evicting.kernel, keep=evicting.keep))
        self.sealed[index] = held.length // self.layout.block_tokens * self.layout.block_tokens
