"""Slow and obvious: dense attention over plain tensors, what the paged session is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch

from kvtier.core.draft_tree import DraftTree, TreePath, rows_of_path
from kvtier.errors import SessionStateError
from kvtier.testing.plain_drafts import PlainDrafts, PlainLine
from kvtier.types import KVLayout

__all__ = ["PlainMemory", "PlainReport", "PlainSession"]


@dataclass(frozen=True)
class _Row:
    """One layer of one sequence: k [Hk, T, Dk], v [Hk, T, Dv], and of every token its position and its column."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor

    def select(self, tokens: torch.Tensor) -> _Row:
        return _Row(self.k[:, tokens], self.v[:, tokens], self.positions[tokens], self.columns[tokens])


@dataclass(frozen=True)
class PlainReport:
    """What a plain session holds: its rows, its columns (padding included) and the bytes of its tensors."""

    rows: int
    columns: int
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return asdict(self)


class PlainSession:
    """A session that keeps every key and value as they came: no pages, no tiers, no policy, no kernels.

    Parameters
    ----------
    layers : int
        How many layers the model has, L.
    """

    def __init__(self, layers: int) -> None:
        self._layers: list[list[_Row]] = [[] for _ in range(layers)]
        self._lengths = [0] * layers
        self._drafts = PlainDrafts()
        self._closed = False

    @property
    def length(self) -> int:
        """Columns that every layer has seen, padding included."""
        return min(self._lengths)

    @property
    def rows(self) -> int:
        """Sequences held; 0 before the first append."""
        return len(self._layers[0])

    @property
    def drafted(self) -> int:
        """Columns that are drafted and wait for ``accept``."""
        return self._drafts.columns

    def expect(self, tokens: int) -> None:
        """Take note of nothing: a plain session treats a prompt as any other tokens."""
        self._check_open()
        if tokens < 1:
            raise SessionStateError(f"a prompt has at least 1 token, got {tokens}")

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        *,
        spans: Sequence[slice] | None = None,
        tree: DraftTree | None = None,
    ) -> None:
        """Add k [B, Hk, Tq, Dk], v [B, Hk, Tq, Dv] at positions [B, Tq]; ``spans[b]`` are the real tokens of row b."""
        self._check_open()
        if tree is not None:
            self._drafts.add(layer, k, v, positions, tree)
            return
        rows = self._layers[layer] or [_empty(k[b], v[b]) for b in range(k.shape[0])]
        if len(rows) != k.shape[0]:
            raise SessionStateError(f"this session holds {len(rows)} rows, got {k.shape[0]}")
        columns = torch.arange(k.shape[2]) + self._lengths[layer]
        for b, row in enumerate(rows):
            real = slice(None) if spans is None else spans[b]
            rows[b] = _Row(
                torch.cat([row.k, k[b, :, real]], dim=1),
                torch.cat([row.v, v[b, :, real]], dim=1),
                torch.cat([row.positions, positions[b, real].cpu()]),
                torch.cat([row.columns, columns[real]]),
            )
        self._layers[layer] = rows
        self._lengths[layer] += k.shape[2]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        positions: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sink: torch.Tensor | None = None,
        spans: Sequence[slice] | None = None,
    ) -> torch.Tensor:
        """Causal softmax attention of q [B, Hq, Tq, Dk] over its own row -> [B, Hq, Tq, Dv], zeros on padding."""
        self._check_open()
        rows = self._layers[layer]
        if self._drafts.pending:

            def behind(b: int, line: PlainLine, own: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
                del level
                k_pos = torch.cat([rows[b].positions, line.positions])
                visible = torch.ones_like(k_pos, dtype=torch.bool) if window is None else k_pos > k_pos[-1] - window
                k, v = torch.cat([rows[b].k, line.keys], dim=1), torch.cat([rows[b].v, line.values], dim=1)
                return _softmax_attention(own, k, v, visible[None].to(q.device), scale, softcap, sink)

            return self._drafts.attend(layer, q, rows[0].v.shape[-1], behind)
        out = q.new_zeros(*q.shape[:3], rows[0].v.shape[-1])
        for b, row in enumerate(rows):
            real = slice(None) if spans is None else spans[b]
            q_pos, k_pos = positions[b, real].cpu()[:, None], row.positions[None, :]
            visible = k_pos <= q_pos
            if window is not None:
                visible = visible & (k_pos > q_pos - window)
            out[b, :, real] = _softmax_attention(
                q[b, :, real], row.k, row.v, visible.to(q.device), scale, softcap, sink
            )
        return out

    def fork(self) -> PlainSession:
        """A second session with the same tokens; the two grow apart."""
        self._check_open()
        twin = PlainSession(len(self._layers))
        twin._layers, twin._lengths = [list(rows) for rows in self._layers], list(self._lengths)
        return twin

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was; rows may repeat or disappear."""
        self._check_open()
        self._layers = [[held[row] for row in rows] for held in self._layers]

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` columns of every row."""
        self._check_open()
        if not 0 <= remove <= self.length:
            raise SessionStateError(f"crop takes 0 to {self.length} columns, got {remove}")
        self._keep_columns(torch.arange(self.length - remove))

    def accept(self, path: TreePath) -> None:
        """Append the drafted tokens of a path, or of one for each row, and forget the others."""
        self._check_open()
        if not self._drafts.pending:
            raise SessionStateError("there is nothing to accept: append(..., tree=) drafted tokens first")
        paths = rows_of_path(path, self.rows)
        for (layer, b), line in self._drafts.take(paths, len(self._layers)).items():
            row, columns = self._layers[layer][b], self._lengths[layer] + torch.arange(line.positions.numel())
            self._layers[layer][b] = _Row(
                torch.cat([row.k, line.keys], dim=1),
                torch.cat([row.v, line.values], dim=1),
                torch.cat([row.positions, line.positions]),
                torch.cat([row.columns, columns]),
            )
        self._lengths = [length + max(map(len, paths)) for length in self._lengths]

    def record_past(self, record: bool) -> None:
        """Take note of nothing: a plain session never drops what slides out of a window."""
        self._check_open()

    def report(self) -> PlainReport:
        """Rows, columns and bytes."""
        tensors = [t for rows in self._layers for row in rows for t in (row.k, row.v)]
        return PlainReport(self.rows, self.length, sum(t.nbytes for t in tensors))

    def close(self) -> None:
        """Drop everything; a second call does nothing."""
        self._layers = [[] for _ in self._layers]
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionStateError("this session is closed; open another")

    def _keep_columns(self, kept: torch.Tensor) -> None:
        """Hold only these columns (ascending), numbered anew from 0."""
        for rows in self._layers:
            for b, row in enumerate(rows):
                row = row.select(torch.isin(row.columns, kept))
                rows[b] = _Row(row.k, row.v, row.positions, torch.searchsorted(kept, row.columns))
        self._lengths = [len(kept)] * len(self._lengths)


class PlainMemory:
    """A memory whose sessions are plain.

    Parameters
    ----------
    max_prefill : int, optional
        What ``max_prefill_chunk`` answers, in tokens; None for no bound.
    """

    def __init__(self, layout: KVLayout, *, max_prefill: int | None = None) -> None:
        self.layout = layout
        self.sessions: list[PlainSession] = []
        self._max_prefill = max_prefill

    def session(self) -> PlainSession:
        """An empty session; ``sessions`` lists every one that was made."""
        self.sessions.append(PlainSession(len(self.layout.layers)))
        return self.sessions[-1]

    def max_prefill_chunk(self, batch: int) -> int | None:
        """The longest prefill, in tokens, that fits; None when any does."""
        return self._max_prefill

    def close(self) -> None:
        """Close every session."""
        for session in self.sessions:
            session.close()


def _empty(k: torch.Tensor, v: torch.Tensor) -> _Row:
    none = torch.zeros(0, dtype=torch.long)
    return _Row(k[:, :0], v[:, :0], none, none)


def _softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of q [Hq, Tq, Dk] over k, v [Hk, T, D] where ``visible`` [Tq, T]: logits, softmax, weighted sum."""
    exact = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[0] // k.shape[0]
    k, v = (x.to(exact).repeat_interleave(group, dim=0) for x in (k, v))
    logits = q.to(exact) @ k.transpose(1, 2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.to(exact)[:, None, None].expand(-1, q.shape[1], 1)], dim=2)
    weights = torch.softmax(logits, dim=2)[..., : v.shape[1]]
    return (weights @ v).to(q.dtype)
