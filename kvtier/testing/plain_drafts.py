"""Slow and obvious: drafted tokens as a list, each attended to with its own line of ancestors behind what is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from kvtier.core.draft_tree import DraftTree

__all__ = ["PlainColumns", "PlainDrafts", "PlainLine"]


@dataclass
class _Node:
    """One token in one layer and row: k [Hk, Dk], v [Hk, Dv], and its query [Hq, Dk] once it has attended."""

    key: torch.Tensor
    value: torch.Tensor
    position: int
    parent: int | None
    query: torch.Tensor | None = None


@dataclass(frozen=True)
class PlainLine:
    """Tokens that follow each other: k [Hk, n, Dk], v [Hk, n, Dv], positions [n], and their queries [Hq, n, Dk]."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    queries: torch.Tensor | None


Attend: TypeAlias = Callable[[int, PlainLine, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a row, a line, the query [Hq, 1, Dk] of its last token and all queries [Hq, n, Dk] of the level: [Hq, 1, Dv]."""


class PlainDrafts:
    """Drafted tokens of every layer and row, which no one has accepted yet.

    Attributes
    ----------
    columns : int
        Columns drafted.
    """

    def __init__(self) -> None:
        self.columns = 0
        self._nodes: dict[tuple[int, int], list[_Node]] = {}
        self._new: dict[tuple[int, int], int] = {}

    @property
    def pending(self) -> bool:
        """Whether there are any."""
        return bool(self._nodes)

    def all(self, layer: int, row: int) -> PlainLine:
        """Every token of one row in one layer, in the order they came."""
        return self._line(layer, row, range(len(self._nodes[layer, row])))

    def add(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, tree: DraftTree
    ) -> None:
        """Tokens K [B, Hk, Tq, Dk], V [B, Hk, Tq, Dv] of one layer at positions [B, Tq]."""
        self.columns += keys.shape[2] if layer == 0 else 0
        for row, parents in enumerate(tree.of_rows(keys.shape[0])):
            nodes = self._nodes.setdefault((layer, row), [])
            self._new[layer, row] = len(parents)
            for column, parent in enumerate(parents):
                place = int(positions[row, column])
                nodes.append(_Node(keys[row, :, column], values[row, :, column], place, parent))

    def attend(self, layer: int, query: torch.Tensor, value_dim: int, one: Attend) -> torch.Tensor:
        """Outputs [B, Hq, Tq, Dv] for the queries of the newest tokens; ``one`` attends for each of them."""
        out = query.new_zeros(*query.shape[:3], value_dim)
        for row in range(query.shape[0]):
            nodes, new = self._nodes[layer, row], self._new[layer, row]
            for column in range(new):
                token = len(nodes) - new + column
                nodes[token].query = query[row, :, column]
                own, level = query[row, :, column : column + 1], query[row, :, :new]
                out[row, :, column] = one(row, self._line(layer, row, self._descent(nodes, token)), own, level)[:, 0]
        return out

    def take(self, paths: Sequence[Sequence[int]], layers: int) -> dict[tuple[int, int], PlainLine]:
        """The accepted line of each layer and row that has one; nothing is pending then."""
        lines = {
            (layer, row): self._line(layer, row, path)
            for layer in range(layers)
            for row, path in enumerate(paths)
            if path
        }
        self.columns, self._nodes, self._new = 0, {}, {}
        return lines

    def _descent(self, nodes: Sequence[_Node], token: int) -> list[int]:
        """From a token without a parent down to ``token``."""
        parent = nodes[token].parent
        return [token] if parent is None else [*self._descent(nodes, parent), token]

    def _line(self, layer: int, row: int, tokens: Sequence[int]) -> PlainLine:
        nodes = [self._nodes[layer, row][token] for token in tokens]
        queries = [node.query for node in nodes if node.query is not None]
        return PlainLine(
            torch.stack([node.key for node in nodes], dim=1),
            torch.stack([node.value for node in nodes], dim=1),
            torch.tensor([node.position for node in nodes]),
            torch.stack(queries, dim=1) if len(queries) == len(nodes) else None,
        )


class PlainColumns:
    """Which columns were tokens in which row, where rows accept paths of different lengths."""

    def __init__(self) -> None:
        self._real: list[list[bool]] = []

    def note(self, tokens: Sequence[int]) -> None:
        """As many columns as the longest row has of these new tokens; the others are padded."""
        self._real = self._real or [[] for _ in tokens]
        for real, count in zip(self._real, tokens, strict=True):
            real += [True] * count + [False] * (max(tokens) - count)

    def crop(self, remove: int) -> list[int]:
        """Forget the last columns; how many tokens that takes from each row."""
        counts = [sum(real[len(real) - remove :]) for real in self._real]
        self._real = [real[: len(real) - remove] for real in self._real]
        return counts

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self._real = [list(self._real[row]) for row in rows]
