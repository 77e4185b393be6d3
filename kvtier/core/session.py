"""A session: the KV cache of one batch of sequences, appended to and attended over, layer by layer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.core.attention import Queries
from kvtier.core.batch import Batch, distinct_rows
from kvtier.core.checks import check_keys, check_queries, layer_of, spans_of
from kvtier.core.columns import ColumnHistory
from kvtier.core.explain import LayerExplanation, explain_layers
from kvtier.core.guarded import Guarded, guarded
from kvtier.core.prompt import PromptTracker
from kvtier.core.raw import RawTokens
from kvtier.core.readout import read_tokens
from kvtier.core.report import SessionReport, session_report
from kvtier.core.restore import Restoration
from kvtier.core.saved.load import open_saved
from kvtier.core.saved.save import Seen, save_batch
from kvtier.core.step import Step, joined
from kvtier.errors import InputError, SessionStateError

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["Session"]

_names = itertools.count()


class Session(Guarded):
    """Sequences of one batch; made by ``Memory.session()``.

    Every layer is fed in the same way: ``append`` its new keys and values, then ``attend`` with its queries. Padding
    is named by ``spans`` and never stored; each row is a sequence of its own.

    Notes
    -----
    Any thread may call; calls of all sessions of one memory take turns. ``close`` frees what no fork shares.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self._name = next(_names)
        self._batch = Batch(memory, [], PromptTracker())
        self._columns = [0] * len(memory.layout.layers)
        self._history = ColumnHistory()
        self._draft_columns: int | None = None
        self._raw = RawTokens(memory.ledger_of)
        self._recording = False
        self._step: Step | None = None
        self._seconds = {"append": 0.0, "attend": 0.0}

    @property
    def length(self) -> int:
        """Columns that every layer has seen, padding included."""
        return min(self._columns)

    @property
    def croppable(self) -> int:
        """Columns that ``crop`` may take: back to the last eviction, and to where every window is whole."""
        return min([self.length, *(sequence.croppable for sequence in self._batch.sequences)])

    @property
    def rows(self) -> int:
        """Sequences held; 0 before the first append."""
        return len(self._batch.rows)

    @guarded
    def expect(self, tokens: int) -> None:
        """Announce a prompt: the next ``tokens`` columns; prefill policies act when all have been attended.

        Without it each append of several tokens is a prompt of its own; once used, only announced tokens are prompts.
        """
        if tokens < 1:
            raise InputError(f"a prompt has at least 1 token, got {tokens}")
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

        Raises
        ------
        InputError
            For shapes or positions that do not fit; nothing changed.
        CapacityError
            When no tier has room. The session must be closed then: its layers no longer agree.
        """
        started, held = time.perf_counter(), self.rows
        check_keys(layer_of(self.memory.layout, layer), layer, held, keys, values)
        rows, _, tokens, _ = keys.shape
        leading = self._columns[layer] == max(self._columns)
        if leading:
            # Whoever counts positions up in place gives the same tensor again.
            self._step = None
        step = self._step_of(positions, spans, rows, tokens)
        self._batch.check_order(layer, step)
        if tokens > 1:
            self._batch.prompt.check(self._columns[layer], tokens)
        if leading:
            self._check_finished()
        try:
            if not held:
                self._open(rows)
            self._raw.hold(layer, keys, values)
            if leading:
                self._begin_step(keys, values, spans)
            self._batch.append(layer, keys, values, step)
        except BaseException as error:
            self._fail("an append", error)
            raise
        self._columns[layer] += tokens
        if tokens > 1 and self._draft_columns is None:
            self._batch.prompt.appended(self._columns[layer], tokens)
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
        twin = Session(self.memory)
        twin._batch = self._batch.fork()
        twin._columns, twin._history = list(self._columns), self._history.fork()
        twin._draft_columns, twin._recording = self._draft_columns, self._recording
        return twin

    @guarded
    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was; rows may repeat (they fork) or disappear (they are freed)."""
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
        if self._draft_columns is not None:
            raise SessionStateError("a draft is open; accept() it before a crop")
        if not 0 <= remove <= self.length:
            raise InputError(f"crop takes 0 to {self.length} columns, got {remove}")
        history, counts = self._history.without(remove, self.rows)
        self._batch.crop(counts)
        self._history = history
        self._columns = [columns - remove for columns in self._columns]
        self._batch.prompt.crop(self.length)

    @guarded
    def begin_draft(self) -> None:
        """Tokens appended from now on are speculation: they stay on the device, unsealed, until ``accept``."""
        if self._draft_columns is not None:
            raise SessionStateError("a draft is already open; accept() it first")
        self._draft_columns = self.length
        for sequence in self._batch.sequences:
            sequence.begin_draft()

    @guarded
    def accept(self, path: Sequence[int]) -> None:
        """Commit the drafted tokens at ``path``, ascending and counted from the draft's start; forget the others."""
        if self._draft_columns is None:
            raise SessionStateError("accept() needs begin_draft() before the appends it judges")
        drafted = self.length - self._draft_columns
        kept = np.asarray(list(path), dtype=np.int64)
        if kept.size and (kept[0] < 0 or kept[-1] >= drafted or (np.diff(kept) <= 0).any()):
            raise InputError(f"path must be ascending numbers from 0 to {drafted - 1}, got {list(path)}")
        with self._or_unusable("accept()"):
            for sequence in self._batch.sequences:
                sequence.accept(kept)
        self._history, _ = self._history.without(drafted, self.rows)
        self._history.note(kept.size)
        self._columns = [self._draft_columns + kept.size] * len(self._columns)
        self._draft_columns = None

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
        if self._draft_columns is not None:
            raise SessionStateError("a draft is open; accept() it before save()")
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
            self._raw.drop_all()
            self._unusable = _CLOSED
            self.memory.finish(self._name)

    def _step_of(self, positions: torch.Tensor, spans: Sequence[slice] | None, rows: int, tokens: int) -> Step:
        """Positions and spans, checked and on the host; read once for all layers of a step."""
        step = self._step
        if step is None or step.positions is not positions or step.spans is not spans or step.shape != (rows, tokens):
            step = self._step = Step(positions, spans, rows, tokens)
        return step

    def _check_finished(self) -> None:
        """Refuse to begin a step while a layer lacks the one before."""
        columns, length = max(self._columns), self.length
        if columns != length:
            behind = self._columns.index(length)
            raise SessionStateError(
                f"layer {behind} has seen {length} of {columns} columns: the last step did not finish; append() "
                "to it first, or close this session"
            )

    def _open(self, rows: int) -> None:
        """Start the rows, in the state that was asked for before there were any."""
        self._batch.open(rows)
        self._batch.record(self._recording)
        if self._draft_columns is not None:
            for sequence in self._batch.sequences:
                sequence.begin_draft()

    def _begin_step(self, keys: torch.Tensor, values: torch.Tensor, spans: Sequence[slice] | None) -> None:
        """Once per step: note the columns, and plan the memory of a prompt."""
        tokens = keys.shape[2]
        first = self._history.empty
        self._history.note(tokens, None if spans is None else tuple((span.start, span.stop) for span in spans))
        if first or tokens > self.memory.layout.block_tokens:
            coming = max(tokens, (self._batch.prompt.end or 0) - self.length)
            rows, probing = distinct_rows(keys, values), self._batch.probing
            self.memory.plan(self._name, rows, held=self.length, coming=coming, chunk=tokens, probing=probing)


_CLOSED = "this session is closed; make a new one with memory.session()"
