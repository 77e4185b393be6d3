"""Random tokens for every layer of a layout, and small memories over chosen tiers: what tests feed to sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from kvtier.config import load_config
from kvtier.core.compose import policy
from kvtier.core.draft_tree import DraftTree
from kvtier.core.memory import Memory
from kvtier.testing.session_machine import small_layout
from kvtier.types import Budgets, KVLayout

__all__ = ["SCALE", "Attending", "Step", "StepSource", "open_memory"]

SCALE = 0.3


class Attending(Protocol):
    """What a session and its oracle have in common."""

    def append(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        /,
        *,
        spans: Sequence[slice] | None = None,
        tree: DraftTree | None = None,
    ) -> None:
        """Add keys and values of one layer, or draft them."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        positions: torch.Tensor,
        /,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sink: torch.Tensor | None = None,
        spans: Sequence[slice] | None = None,
    ) -> torch.Tensor:
        """Attend over all that was appended to one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """New tokens of every layer: keys [B, Hk, Tq, Dk], values [B, Hk, Tq, Dv], queries [B, Hq, Tq, Dk] by layer.

    Parameters
    ----------
    positions : Tensor
        [B, Tq] int64.
    spans : sequence of slice, optional
        The real tokens of each row.
    tree : DraftTree, optional
        The tokens are drafts.
    """

    layout: KVLayout
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    queries: tuple[torch.Tensor, ...]
    positions: torch.Tensor
    spans: tuple[slice, ...] | None = None
    tree: DraftTree | None = None

    def run(
        self, session: Attending, *, softcap: float | None = None, sink: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Append and attend in every layer: outputs [B, Hq, Tq, Dv] by layer."""
        outputs = []
        for index, layer in enumerate(self.layout.layers):
            session.append(
                index, self.keys[index], self.values[index], self.positions, spans=self.spans, tree=self.tree
            )
            outputs.append(
                session.attend(
                    index,
                    self.queries[index],
                    self.positions,
                    scale=SCALE,
                    window=layer.window,
                    softcap=softcap,
                    sink=sink,
                    spans=self.spans,
                )
            )
        return outputs

    def rows(self, rows: Sequence[int]) -> Step:
        """The step of these rows only, in this order."""
        index = torch.tensor(list(rows))
        return Step(
            layout=self.layout,
            keys=tuple(part[index] for part in self.keys),
            values=tuple(part[index] for part in self.values),
            queries=tuple(part[index] for part in self.queries),
            positions=self.positions[index],
            spans=None if self.spans is None else tuple(self.spans[row] for row in rows),
        )

    def padded(self, spans: Sequence[slice], starts: Sequence[int]) -> Step:
        """The step with real tokens in ``spans`` only, at positions from ``starts[b]`` in row b; the rest is NaN."""
        copies = [[part.clone() for part in parts] for parts in (self.keys, self.values, self.queries)]
        positions = torch.zeros_like(self.positions)
        for row, (span, start) in enumerate(zip(spans, starts, strict=True)):
            positions[row, span] = torch.arange(start, start + span.stop - span.start)
            for part in [part for parts in copies for part in parts]:
                part[row, :, : span.start] = part[row, :, span.stop :] = torch.nan
        keys, values, queries = (tuple(parts) for parts in copies)
        return replace(self, keys=keys, values=values, queries=queries, positions=positions, spans=tuple(spans))

    def columns(self, columns: slice) -> Step:
        """The step of these columns only."""
        return Step(
            layout=self.layout,
            keys=tuple(part[:, :, columns] for part in self.keys),
            values=tuple(part[:, :, columns] for part in self.values),
            queries=tuple(part[:, :, columns] for part in self.queries),
            positions=self.positions[:, columns],
        )


class StepSource:
    """Random steps, one after the other, reproducible.

    Attributes
    ----------
    position : int
        Logical position of the next token.
    """

    def __init__(self, layout: KVLayout | None = None, *, rows: int = 1, seed: int = 0) -> None:
        self.layout = layout if layout is not None else small_layout()
        self.rows = rows
        self.position = 0
        self._random = torch.Generator().manual_seed(seed)

    def take(self, tokens: int, *, equal: bool = False) -> Step:
        """The next ``tokens`` tokens of every row; all rows the same if ``equal``."""

        def draw(heads: int, dim: int) -> torch.Tensor:
            drawn = torch.randn(
                1 if equal else self.rows, heads, tokens, dim, generator=self._random, dtype=torch.float64
            )
            return drawn.expand(self.rows, heads, tokens, dim)

        layers = self.layout.layers
        positions = torch.arange(self.position, self.position + tokens)[None].expand(self.rows, tokens)
        self.position += tokens

        def cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
            return tensor.to(getattr(torch, dtype))

        return Step(
            layout=self.layout,
            keys=tuple(cast(draw(layer.num_kv_heads, layer.key_dim), layer.dtype) for layer in layers),
            values=tuple(cast(draw(layer.num_kv_heads, layer.value_dim), layer.dtype) for layer in layers),
            queries=tuple(cast(draw(layer.num_query_heads, layer.key_dim), layer.dtype) for layer in layers),
            positions=positions,
        )


def open_memory(
    layout: KVLayout | None = None,
    policy_text: str = "full",
    *,
    keep: int | None = None,
    read: int | None = None,
    device: int | None = None,
    host: int | str | None = "16MiB",
    nvme: int | str | None = None,
    path: Path | None = None,
) -> Memory:
    """A memory with these budgets over these tiers; a tier of None is left out."""
    layout = layout if layout is not None else small_layout()
    tiers: list[dict[str, object]] = []
    if host is not None:
        tiers.append({"name": "host", "backend": "host", "capacity": host})
    if nvme is not None:
        tiers.append({"name": "nvme", "backend": "spill", "capacity": nvme, "path": path})
    config = load_config({"tiers": tiers, "page_tokens": layout.page_tokens, "block_tokens": layout.block_tokens})
    return Memory(layout, policy(policy_text), Budgets(keep=keep, read=read, device=device), config)
