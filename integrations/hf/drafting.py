"""The drafted tokens of one cache: which forward brings them, where they stand, and what an accepted path adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvtier.core.draft_tree import DraftTree, RowTree
from kvtier.errors import InputError, SessionStateError
from kvtier.integrations.hf.columns import Columns
from kvtier.integrations.hf.history import History

__all__ = ["Drafting"]


class Drafting:
    """Trees of drafted tokens that wait to be accepted, and the one that the next forward brings.

    Parameters
    ----------
    history : History
        What the cache was fed: drafts follow its last tokens.

    Attributes
    ----------
    tree : DraftTree, optional
        What the next forward brings; None outside of ``cache.drafts``.
    pending : bool
        Whether a forward has brought any.
    """

    def __init__(self, history: History) -> None:
        self.tree: DraftTree | None = None
        self.pending = False
        self._roots: list[int] = (history.last_positions + 1).tolist()
        self._rows = [RowTree()] * history.rows
        self._ids: list[torch.Tensor | None] = []
        self._widths: list[int] = []
        self._level: list[RowTree] = []
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._copies: dict[torch.device, torch.Tensor] = {}

    def begin(self, tree: DraftTree) -> None:
        """The next forward brings ``tree``.

        Raises
        ------
        InputError
            When it is not one for these rows, or names a parent that there is not.
        """
        each = tree.of_rows(len(self._rows))
        positions = torch.tensor(self._roots)[:, None].repeat(1, tree.tokens)
        column, level = sum(self._widths), []
        for row, (held, parents) in enumerate(zip(self._rows, each, strict=True)):
            places = held.places(parents, self._roots[row])
            positions[row, : len(parents)] = torch.tensor(places, dtype=torch.int64)
            level.append(held.grown(parents, places, last=None, column=column))
        self.tree, self._level, self._positions, self._copies = tree, level, positions, {}

    def prepare(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the forward that brings the tree.

        Raises
        ------
        InputError
            For another number of tokens, for a mask, and for positions that are not those of the tree.
        SessionStateError
            For a second forward.
        """
        if len(self._widths) != len(self._ids):
            raise SessionStateError("one forward brings a tree; enter drafts() again for the next")
        ids, positions = call.get("input_ids"), call.get("position_ids")
        given = ids if ids is not None else call.get("inputs_embeds")
        if given is not None and tuple(given.shape[:2]) != tuple(self._positions.shape):
            raise InputError(
                f"this tree of drafts takes tokens {list(self._positions.shape)} (rows, drafted columns), got "
                f"{list(given.shape[:2])}"
            )
        if call.get("attention_mask") is not None:
            raise InputError("the tree says which tokens a drafted one sees; leave out attention_mask")
        if positions is not None and not torch.equal(positions.cpu().expand_as(self._positions), self._positions):
            raise InputError(
                f"drafted tokens stand at {self._positions.tolist()}, one behind the one they follow, got "
                f"position_ids {positions.tolist()}; they may be left out"
            )
        device = None if given is None else given.device
        return {**call, "position_ids": self._positions if device is None else self.positions_on(device)}

    def positions_on(self, device: torch.device) -> torch.Tensor:
        """Positions [B, Tq] of the tree on a device, copied there once."""
        if device not in self._copies:
            self._copies[device] = self._positions.to(device)
        return self._copies[device]

    def fed(self, ids: torch.Tensor | None) -> None:
        """The forward ran, with these token ids [B, Tq] or with embeddings."""
        self.pending = True
        self._ids.append(None if ids is None else ids.cpu())

    def end(self) -> None:
        """No forward brings a tree now; what one has brought is pending."""
        if len(self._ids) > len(self._widths):
            self._rows = self._level
            self._widths.append(self._positions.shape[1])
        self.tree = None

    def accepted(self, paths: Sequence[Sequence[int]]) -> tuple[Columns, torch.Tensor | None]:
        """What these paths add to every row: columns, those of shorter paths padded on the right, and their ids."""
        width = max(map(len, paths))
        positions = torch.zeros(len(paths), width, dtype=torch.int64)
        ids = None if any(one is None for one in self._ids) else torch.zeros_like(positions)
        drafted = torch.cat([one for one in self._ids if one is not None], dim=1) if ids is not None else None
        for row, (tree, path) in enumerate(zip(self._rows, paths, strict=True)):
            for column, token in enumerate(path):
                positions[row, column] = tree.positions[token]
                if ids is not None and drafted is not None:
                    ids[row, column] = drafted[row, tree.columns[token]]
        spans = tuple(slice(0, len(path)) for path in paths)
        real = torch.arange(width) < torch.tensor([[len(path)] for path in paths])
        return (Columns(positions) if bool(real.all()) else Columns(positions, real, spans)), ids
