"""What the adapter asks of a memory and of its sessions: the one seam between transformers and the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvtier.core.draft_tree import DraftTree, TreePath
from kvtier.types import KVLayout

__all__ = ["Memory", "Report", "Session"]


class Report(Protocol):
    """Counts and bytes of a session."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""


class Session(Protocol):
    """A batch of sequences: rows come with the first append; one thread at a time."""

    @property
    def rows(self) -> int:
        """Sequences held."""

    @property
    def drafted(self) -> int:
        """Columns that are drafted and wait to be accepted."""

    def expect(self, tokens: int, /) -> None:
        """Announce that the next ``tokens`` columns are one prompt."""

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        /,
        *,
        spans: Sequence[slice] | None = None,
        tree: DraftTree | None = None,
    ) -> None:
        """Take k [B, Hk, Tq, Dk], v [B, Hk, Tq, Dv] at positions [B, Tq]; ``spans[b]`` are the tokens of row b.

        With a ``tree`` they are drafts.
        """

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        positions: torch.Tensor,
        /,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sink: torch.Tensor | None = None,
        spans: Sequence[slice] | None = None,
    ) -> torch.Tensor:
        """Attention of q [B, Hq, Tq, Dk] over its row -> [B, Hq, Tq, Dv], zeros on padding."""

    def fork(self) -> Session:
        """A second session that starts with the same tokens."""

    def reorder(self, rows: Sequence[int], /) -> None:
        """Row i becomes what row ``rows[i]`` was."""

    def crop(self, remove: int, /) -> None:
        """Forget the last ``remove`` columns of every row."""

    def accept(self, path: TreePath, /) -> None:
        """Append the drafted tokens of a path, forget the others."""

    def record_past(self, recording: bool, /) -> None:
        """Keep, in sliding-window layers, what a crop may need."""

    def report(self) -> Report:
        """Counts and bytes so far."""

    def close(self) -> None:
        """Free everything; a second call does nothing."""


class Memory(Protocol):
    """Arenas and tiers of one model, shared by its sessions; safe to use from several threads."""

    @property
    def layout(self) -> KVLayout:
        """The layout it was made for."""

    def session(self) -> Session:
        """An empty session."""

    def max_prefill_chunk(self, rows: int, /) -> int | None:
        """The longest prefill of ``rows`` rows, in columns, that fits the device budget; None when any does."""

    def close(self) -> None:
        """Close every session and free every tier."""
