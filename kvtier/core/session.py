"""A session: the KV cache of one batch of sequences, appended to and attended over, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvtier.core.appending import Appending
from kvtier.core.attention import Queries
from kvtier.core.checks import check_keys, check_queries, layer_of, spans_of
from kvtier.core.draft_tree import DraftTree, TreePath
from kvtier.core.drafts import Drafts, Softmax
from kvtier.core.explain import LayerExplanation, explain_layers
from kvtier.core.guarded import guarded
from kvtier.core.readout import read_tokens
from kvtier.core.report import SessionReport, session_report
from kvtier.core.restore import Restoration
from kvtier.core.saved.load import open_saved
from kvtier.core.saved.save import Seen, save_batch
from kvtier.core.step import joined
from kvtier.errors import InputError, SessionStateError

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["Session"]


class Session(Appending):
    """Sequences of one batch; made by ``Memory.session()``.

    Every layer is fed in the same way: ``append`` its new keys and values, then ``attend`` with its queries. Padding
    is named by ``spans`` and never stored; each row is a sequence of its own.

    Notes
    -----
    Any thread may call; calls of all sessions of one memory take turns. ``close`` frees what no fork shares.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self._drafts = Drafts(memory, self._raw)
        self._seconds = {"append": 0.0, "attend": 0.0}

    @property
    def croppable(self) -> int:
        """Columns that ``crop`` may take: back to the last eviction, and to where every window is whole."""
        return min([self.length, *(sequence.croppable for sequence in self._batch.sequences)])

    @property
    def drafted(self) -> int:
        """Columns that are drafted and wait for ``accept``; ``length`` does not count them."""
        return self._drafts.columns

    @guarded
    def expect(self, tokens: int) -> None:
        """Announce a prompt: the next ``tokens`` columns; prefill policies act when all have been attended.

        Without it each append of several tokens is a prompt of its own; once used, only announced tokens are prompts.
        """
        if tokens < 1:
            raise InputError(f"a prompt has at least 1 token, got {tokens}")
        self._drafts.refuse("a prompt")
        self._batch.prompt.announce(self.length + tokens)

    @guarded
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
        """Add the keys and values of one layer.

        Parameters
        ----------
        keys, values : Tensor
            [B, Hk, Tq, Dk] and [B, Hk, Tq, Dv], keys as the model made them (after RoPE).
        positions : Tensor
            Logical positions [B or 1, Tq] int64, ascending within a row's span.
        spans : sequence of slice, optional
            The real tokens of each row; the rest is padding.
        tree : DraftTree, optional
            The tokens are drafts: the first columns of a row are its part of the tree. They stay beside what is held,
            where only ``attend`` sees them, until ``accept``; more may follow them.

        Raises
        ------
        InputError
            For shapes or positions that do not fit; nothing changed.
        CapacityError
            When no tier has room. The session must be closed then: its layers no longer agree. Drafts that find no
            room are dropped, all of them, and the session goes on.
        """
        started = time.perf_counter()
        check_keys(layer_of(self.memory.layout, layer), layer, self.rows, keys, values)
        if tree is None:
            self._drafts.refuse("other tokens are appended")
            self._extend(layer, keys, values, positions, spans)
        else:
            self._check_finished()
            self._drafts.check(self._batch, self.length, spans)
            self._drafts.stage(self._batch, layer, keys, values, positions, tree)
        self._seconds["append"] += time.perf_counter() - started

    @guarded
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        positions: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sink: torch.Tensor | None = None,
        spans: Sequence[slice] | None = None,
    ) -> torch.Tensor:
        """Attention of the queries of one layer over everything appended to it; causal by position.

        While drafts are pending, the queries are those of the tokens drafted last: each sees what is held, its
        ancestors and itself.

        Parameters
        ----------
        query, positions : Tensor
            [B, Hq, Tq, Dk], and [B or 1, Tq] int64.
        scale : float
            Factor of q.k.
        window, softcap : optional
            Keys ``window`` or more positions back are not seen; logits become ``softcap * tanh(logit / softcap)``.
        sink : Tensor, optional
            Logit of a key without a value, per query head [Hq].

        Returns
        -------
        Tensor
            [B, Hq, Tq, Dv] in the dtype of the query; zeros on padding.
        """
        started, batch, rows = time.perf_counter(), self._batch, self.rows
        check_queries(layer_of(self.memory.layout, layer), layer, rows, query)
        if self.drafted:
            how = Softmax(scale, window, softcap, sink)
            out = self._drafts.attend(batch, layer, query, positions, how)
            self._raw.drop(layer)
            batch.work_ahead(layer, decoding=True)
            self._seconds["attend"] += time.perf_counter() - started
            return out
        step = self._step_of(positions, spans, rows, query.shape[2])
        columns = self._columns[layer]
        if not columns:
            raise SessionStateError(f"nothing was appended to layer {layer}; append() its keys and values first")
        decoding = batch.prompt.decoding(columns)
        last, outs = None, []
        for row in step.rows:
            last = Queries(row.of(query), row.positions, row.first, scale, window, softcap)
            outs.append(batch.attend(layer, row.number, last, sink, decoding=decoding).out)
        self._raw.drop(layer)
        if last is not None and columns == batch.prompt.end:
            with self._or_unusable("an eviction"):
                batch.evict(layer, last)
        batch.work_ahead(layer, decoding=decoding)
        out = joined(outs, step, query, self.memory.layout.layers[layer].value_dim)
        self._seconds["attend"] += time.perf_counter() - started
        return out

    @guarded
    def fork(self) -> Session:
        """A second session with the same contents: pages shared, tails copied; the two grow apart."""
        self._drafts.refuse("a fork")
        twin = Session(self.memory)
        twin._batch = self._batch.fork()
        twin._columns, twin._history = list(self._columns), self._history.fork()
        twin._recording = self._recording
        return twin

    @guarded
    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was; rows may repeat (they fork) or disappear (they are freed)."""
        self._drafts.refuse("a reorder")
        if not rows or not all(0 <= row < self.rows for row in rows):
            raise InputError(f"rows must be numbers from 0 to {self.rows - 1}, got {list(rows)}")
        with self._or_unusable("a reorder"):
            self._batch.reorder(rows)
        self._history = self._history.reordered(rows)

    @guarded
    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` columns of every row.

        Raises
        ------
        InputError
            When there are fewer.
        SessionStateError
            When the tokens before them were evicted, or slid out of a window without ``record_past``; nothing changed.
        """
        self._drafts.refuse("a crop")
        if not 0 <= remove <= self.length:
            raise InputError(f"crop takes 0 to {self.length} columns, got {remove}")
        history, counts = self._history.without(remove, self.rows)
        self._batch.crop(counts)
        self._history = history
        self._columns = [columns - remove for columns in self._columns]
        self._batch.prompt.crop(self.length)

    @guarded
    def accept(self, path: TreePath) -> None:
        """Append the drafted tokens on a path and forget the others, as if only those had ever been appended.

        Parameters
        ----------
        path : sequence of int, or one for each row
            Numbers of drafted tokens from one without a parent downwards; ``[]`` drops them all. Where rows accept
            paths of different lengths, the shorter ones are padded on the right.

        Raises
        ------
        InputError, SessionStateError
            For what is no path of the tree, or when nothing is drafted; nothing changed.
        """
        accepted = self._drafts.choose(path)
        with self._or_unusable("accept()"):
            self._drafts.commit(self._batch, accepted)
        if accepted.width:
            self._history.note(accepted.width, accepted.padding)
            self._columns = [columns + accepted.width for columns in self._columns]

    @guarded
    def record_past(self, recording: bool) -> None:
        """Whether sliding-window layers keep all tokens until the next ``crop``, which may go back past the window."""
        self._recording = recording
        self._batch.record(recording)

    @guarded
    def read(self, layer: int, row: int, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Copy ``tokens`` of a row, whole pages, into ``keys`` [Hk, n, Dk] and ``values``; whether all are here."""
        return read_tokens(self._batch.rows[row][layer], tokens.start, tokens.stop, keys, values)

    @guarded
    def restoring(self, rows: int, *, coming: int) -> Restoration:
        """Begin to put tokens of another session into this empty one, of ``coming`` a row; ``restored`` must follow."""
        if self.rows:
            raise SessionStateError(f"only an empty session can be restored, and this one holds {self.rows} rows")
        with self._or_unusable("a restoration"):
            self._open(rows)
            self.memory.plan(self._name, rows, held=0, coming=coming, chunk=self.memory.layout.chunk_tokens)
        return Restoration(self._batch)

    @guarded
    def restored(self, columns: int, spans: Sequence[slice]) -> None:
        """The restoration is complete: ``columns`` are seen, with the tokens of each row where ``spans`` says."""
        with self._or_unusable("a restoration"):
            real = spans_of(spans, self.rows, columns)
            Restoration(self._batch).check([span.stop - span.start for span in real])
        self._history.note(columns, tuple((span.start, span.stop) for span in real))
        self._columns = [columns] * len(self._columns)

    @guarded
    def save(
        self, path: Path | str, *, model: str | None = None, attached: Mapping[str, torch.Tensor] | None = None
    ) -> int:
        """Write everything this session holds into one file, which `Memory.restore` takes back, in any process.

        Parameters
        ----------
        path : Path or str
            The file is there whole or not at all, synced; one that was there before is replaced.
        model : str, optional
            What the keys and values were made with, as ``kvtier.fingerprint`` names it; must be given again.
        attached : mapping of str to Tensor, optional
            What `load` is to return.

        Returns
        -------
        int
            Bytes of the file.

        Raises
        ------
        SessionStateError
            Within a step, a draft, or a prompt whose attention the policy watches.
        PagesLostError
            When a page in a lower tier is damaged or cannot be read; no file is left.
        StorageError
            When the file cannot be written; no file is left, and an old one stays.

        Notes
        -----
        Pages that rows share are written once; logs and counts for reports are not. Other sessions of the memory wait.
        """
        self._check_finished()
        self._drafts.refuse("the session is saved")
        seen = Seen(self.length, self._history, self._recording)
        return save_batch(Path(path), self._batch, seen, model=model, attached=attached or {})

    @guarded
    def load(self, path: Path | str, *, model: str | None = None) -> dict[str, torch.Tensor]:
        """Become, from empty, what `save` wrote, and return what was attached; raises as `Memory.restore`.

        After an error the session is unchanged, or can only be closed.
        """
        if self.rows:
            raise SessionStateError(f"only an empty session can be loaded, and this one holds {self.rows} rows")
        with open_saved(Path(path), self.memory, model) as saved, self._or_unusable("loading"):
            held = saved.description
            self._recording = held.recording
            self._open(len(held.rows))
            self.memory.plan(self._name, self.rows, held=0, coming=saved.tokens, chunk=self.memory.layout.chunk_tokens)
            saved.fill(self._batch)
            self._history, self._columns = saved.history, [held.columns] * len(self._columns)
            return saved.attached()

    @guarded
    def report(self) -> SessionReport:
        """What this session and the memory under it hold, read and spent."""
        return session_report(self._batch, tokens=self.length, seconds=self._seconds)

    @guarded
    def explain(self, row: int) -> tuple[LayerExplanation, ...]:
        """What each layer holds of a row, and how often decode steps read it where the memory has that logged."""
        return explain_layers(self._batch, row)

    def close(self) -> None:
        """Free what no fork shares; idempotent."""
        with self.memory.lock:
            if self._unusable == _CLOSED:
                return
            self._batch.release()
            self._drafts.drop()
            self._raw.drop_all()
            self._unusable = _CLOSED
            self.memory.finish(self._name)


_CLOSED = "this session is closed; make a new one with memory.session()"
