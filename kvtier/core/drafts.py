"""Drafted tokens of a session: staged beside what it holds, attended to as a tree, and appended once accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvtier.core.attention import AnySequence, Queries
from kvtier.core.batch import Batch
from kvtier.core.draft_tree import DraftTree, RowTree, TreePath, rows_of_path
from kvtier.core.kept import KeptSequence
from kvtier.core.raw import RawTokens
from kvtier.core.step import Row, Step, joined
from kvtier.errors import CapacityError, InputError, SessionStateError
from kvtier.kernels.gather_attention import attend_run
from kvtier.kernels.merge_partials import merge_partials, sink_partial
from kvtier.types import Partial, Tree, Visibility

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["Accepted", "Drafts", "Softmax"]

_PURPOSE = "drafts"


class Softmax(NamedTuple):
    """How the queries of a layer attend: as for ``Session.attend``."""

    scale: float
    window: int | None
    softcap: float | None
    sink: torch.Tensor | None


class Accepted(NamedTuple):
    """Paths of every row, as columns to append: ``width`` of them, those of row b in ``spans[b]``."""

    paths: list[list[int]]
    width: int
    spans: tuple[slice, ...]

    @property
    def padding(self) -> tuple[tuple[int, int], ...] | None:
        """Start and stop of every span; None when all columns are tokens."""
        if all(span.stop == self.width for span in self.spans):
            return None
        return tuple((span.start, span.stop) for span in self.spans)


@dataclass(slots=True)
class _Level:
    """Drafted tokens that came in one append: their tree, and the step of each positions tensor they came with."""

    tree: DraftTree
    step: Step
    masks: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def step_of(self, positions: torch.Tensor, tokens: int) -> Step:
        """The step, if these are its positions [B or 1, Tq]."""
        if positions is not self.step.positions:
            own = Step(positions, self.step.spans, self.step.shape[0], tokens)
            if [row.numbers for row in own.rows] != [row.numbers for row in self.step.rows]:
                raise InputError("all layers must be given the same positions for drafted tokens")
        return self.step


@dataclass(slots=True)
class _Held:
    """Drafted tokens of one row in one layer: K [1, Hk, N, Dk], V [1, Hk, N, Dv], and their queries where kept."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + (0 if self.queries is None else self.queries.nbytes)


class Drafts:
    """The drafted tokens of one session; nothing that is drafted reaches a sequence before it is accepted.

    Notes
    -----
    Called under the lock of the memory. Keys and values are copies, counted as device memory.
    """

    def __init__(self, memory: Memory, raw: RawTokens) -> None:
        self._memory, self._raw = memory, raw
        self._levels: list[_Level] = []
        self._trees: list[RowTree] = []
        self._held: dict[tuple[int, int], _Held] = {}
        self._staged: list[int] = [0] * len(memory.layout.layers)
        self._attended: list[int] = [0] * len(memory.layout.layers)
        self._softmax: dict[int, Softmax] = {}

    @property
    def columns(self) -> int:
        """Columns that are pending, padding included."""
        return sum(level.tree.tokens for level in self._levels)

    def refuse(self, what: str) -> None:
        """Raise ``SessionStateError`` while drafts are pending."""
        if self._levels:
            raise SessionStateError(
                f"drafted tokens are pending: accept() a path of them, or accept([]) to drop them, before {what}"
            )

    def check(self, batch: Batch, columns: int, spans: Sequence[slice] | None) -> None:
        """Refuse drafts where there is nothing yet that they could follow, after ``columns``; padding is the tree's.

        Raises
        ------
        InputError, SessionStateError
        """
        if spans is not None:
            raise InputError("the tree of each row says which columns are tokens; leave out spans")
        if not columns or batch.prompt.running(columns):
            raise SessionStateError("drafted tokens come after a prompt: append() and attend() all of it first")

    def stage(
        self,
        batch: Batch,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        tree: DraftTree,
    ) -> None:
        """Take drafted tokens of one layer; the first layer opens a level, the others follow it.

        Raises
        ------
        InputError, SessionStateError
            For tokens that do not fit in; nothing changed.
        CapacityError
            When there is no room; nothing is drafted then.
        """
        index, tokens = self._staged[layer], keys.shape[2]
        if index == len(self._levels):
            self._open(batch, layer, positions, tree, tokens)
        level = self._levels[index]
        if tree != level.tree or tokens != level.tree.tokens:
            raise InputError(f"all layers must be given the same tree, got another one for layer {layer}")
        step = level.step_of(positions, tokens)
        try:
            for row in step.rows:
                self._hold(layer, row.number, row.of(keys), row.of(values))
            self._raw.hold(layer, keys, values)
        except CapacityError:
            self.drop()
            raise
        self._staged[layer] = index + 1

    def attend(
        self, batch: Batch, layer: int, query: torch.Tensor, positions: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """Attention of the tokens that came last [B, Hq, Tq, Dk]: to what is held as ever, and to their ancestors."""
        index = self._staged[layer] - 1
        if index + 1 != len(self._levels) or query.shape[2] != self._levels[index].tree.tokens:
            raise SessionStateError(
                f"layer {layer} attends with the queries of the tokens that were drafted last, "
                f"{self._levels[-1].tree.tokens} columns, after their append; got {query.shape[2]}"
            )
        level, outs = self._levels[index], []
        step = level.step_of(positions, query.shape[2])
        for row in step.rows:
            outs.append(self._over_row(batch, layer, level, row, row.of(query), how).out)
            if self._memory.policy.evicts_steps and self._attended[layer] == index:
                self._keep_queries(layer, row.number, row.of(query))
        self._softmax[layer], self._attended[layer] = how, index + 1
        return joined(outs, step, query, self._memory.layout.layers[layer].value_dim)

    def choose(self, path: TreePath) -> Accepted:
        """What a path, or one for each row, asks to append.

        Raises
        ------
        InputError
            For what is no path of the tree.
        SessionStateError
            When nothing is drafted, or not every layer has seen all of it.
        """
        if not self._levels:
            raise SessionStateError("there is nothing to accept: append(..., tree=) drafted tokens first")
        paths = rows_of_path(path, len(self._trees))
        for tree, one in zip(self._trees, paths, strict=True):
            tree.check_path(one)
        width = max(map(len, paths))
        seen = self._attended if self._memory.policy.evicts_steps else self._staged
        if width and min(seen) < len(self._levels):
            raise SessionStateError(
                f"layer {seen.index(min(seen))} has not seen all drafted tokens; append() and attend() them in every "
                "layer, or accept([]) to drop them"
            )
        return Accepted(paths, width, tuple(slice(0, len(one)) for one in paths))

    def commit(self, batch: Batch, accepted: Accepted) -> None:
        """Append what was accepted, and forget the rest.

        At once; or, under a policy that evicts at every step, token by token, each followed by its eviction.
        """
        paths, width, spans = accepted
        positions = torch.zeros(len(paths), max(1, width), dtype=torch.int64)
        for row, (tree, path) in enumerate(zip(self._trees, paths, strict=True)):
            positions[row, : len(path)] = torch.tensor([tree.positions[token] for token in path], dtype=torch.int64)
        one_by_one = self._memory.policy.evicts_steps
        parts = [slice(at, at + 1) for at in range(width)] if one_by_one else [slice(0, width)] * bool(width)
        for part in parts:
            own = [_inside(span, part) for span in spans]
            step = Step(positions[:, part], own, len(paths), part.stop - part.start)
            for layer in range(batch.depth):
                batch.append(layer, *self._gathered(layer, paths, part), step)
                if one_by_one:
                    self._evict(batch, layer, step, paths, part.start)
                batch.work_ahead(layer, decoding=True)
        self.drop()

    def drop(self) -> None:
        """Forget everything that is drafted."""
        for (layer, _), held in self._held.items():
            self._memory.ledger_of[layer].give(_PURPOSE, held.nbytes)
        layers = len(self._staged)
        self._levels, self._trees, self._held, self._softmax = [], [], {}, {}
        self._staged, self._attended = [0] * layers, [0] * layers

    def _open(self, batch: Batch, layer: int, positions: torch.Tensor, tree: DraftTree, tokens: int) -> None:
        """A new level, after every layer has seen the ones before."""
        if min(self._staged) < len(self._levels):
            raise SessionStateError(
                f"layer {self._staged.index(min(self._staged))} lacks drafted tokens that layer {layer} has; append() "
                "them to every layer first"
            )
        rows, column = len(batch.rows), self.columns
        each, trees = tree.of_rows(rows), list(self._trees or [RowTree()] * rows)
        if tokens != tree.tokens:
            raise InputError(f"a tree of {tree.tokens} tokens needs as many columns, got {tokens}")
        step = Step(positions, tree.spans(rows), rows, tokens)
        for row in step.rows:
            last = batch.rows[row.number][layer].last_position
            trees[row.number] = trees[row.number].grown(each[row.number], row.numbers, last=last, column=column)
        self._trees = trees
        self._levels.append(_Level(tree, step))

    def _hold(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copies of new tokens behind those that are there."""
        self._memory.ledger_of[layer].take(_PURPOSE, keys.nbytes + values.nbytes)
        held = self._held.get((layer, row))
        if held is None:
            self._held[layer, row] = _Held(keys.clone(), values.clone())
        else:
            held.keys, held.values = torch.cat([held.keys, keys], dim=2), torch.cat([held.values, values], dim=2)

    def _keep_queries(self, layer: int, row: int, query: torch.Tensor) -> None:
        """Remember the queries of new tokens: their attention counts when they are accepted."""
        self._memory.ledger_of[layer].take(_PURPOSE, query.nbytes)
        held = self._held[layer, row]
        held.queries = query.clone() if held.queries is None else torch.cat([held.queries, query], dim=2)

    def _over_row(
        self, batch: Batch, layer: int, level: _Level, row: Row, query: torch.Tensor, how: Softmax
    ) -> Partial:
        tree, held = self._trees[row.number], self._held[layer, row.number]
        queries = Queries(query, row.positions, min(row.numbers), how.scale, how.window, how.softcap)
        past = _meeting(batch.rows[row.number][layer], queries, tree)
        ancestors, places = self._mask(level, row, query.device)
        own = attend_run(
            query,
            held.keys,
            held.values,
            scale=how.scale,
            softcap=how.softcap,
            visible=None if how.window is None else Visibility(places[:, -row.tokens :], places[None], how.window),
            tree=Tree(ancestors, 0),
        )
        partials = [batch.over_keys(layer, row.number, past, decoding=True, beside=len(tree.parents)), own]
        return merge_partials(partials if how.sink is None else [*partials, sink_partial(how.sink, own)])

    def _mask(self, level: _Level, row: Row, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The ancestors [1, n] of the level's tokens in a row, as bits, and positions [1, N] of all; once a device."""
        found = level.masks.get((row.number, device))
        if found is None:
            tree = self._trees[row.number]
            # Bit 63 is the sign.
            signed = [bits - (bits >> 63 << 64) for bits in tree.ancestors[-row.tokens :]]
            ancestors, places = torch.tensor([signed]), torch.tensor([tree.positions])
            found = level.masks[row.number, device] = ancestors.to(device), places.to(device)
        return found

    def _gathered(self, layer: int, paths: list[list[int]], part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """K [B, Hk, n, Dk] and V [B, Hk, n, Dv] of a part of the paths; zeros where a path is shorter."""
        shape, device = self._memory.layout.layers[layer], self._memory.devices[layer]
        dtype: torch.dtype = getattr(torch, shape.dtype)
        count = part.stop - part.start
        keys, values = (
            torch.zeros(len(paths), shape.num_kv_heads, count, dim, dtype=dtype, device=device)
            for dim in (shape.key_dim, shape.value_dim)
        )
        for row, path in enumerate(paths):
            if path[part]:
                held, index = self._held[layer, row], torch.tensor(path[part], device=device)
                keys[row, :, : index.numel()] = held.keys[0, :, index]
                values[row, :, : index.numel()] = held.values[0, :, index]
        return keys, values

    def _evict(self, batch: Batch, layer: int, step: Step, paths: list[list[int]], at: int) -> None:
        """What follows a decode step of each row under a policy that evicts then: its attention counts, one leaves."""
        how = self._softmax[layer]
        for row in step.rows:
            queries = self._held[layer, row.number].queries
            if isinstance(batch.rows[row.number][layer], KeptSequence) and queries is not None:
                token = paths[row.number][at]
                query = queries[:, :, token : token + 1]
                asked = Queries(query, row.positions, row.first, how.scale, how.window, how.softcap)
                batch.attend(layer, row.number, asked, how.sink, decoding=True)


def _meeting(sequence: AnySequence, queries: Queries, tree: RowTree) -> Queries:
    """The queries as they meet what is held: where positions are compact, as that of a first drafted token does.

    A path has no gaps, so that each of its tokens is as far ahead of its compact position as the first.
    """
    if not isinstance(sequence, KeptSequence) or sequence.compact is None or tree.root is None:
        return queries
    return queries._replace(positions=torch.full_like(queries.positions, tree.root), first=tree.root)


def _inside(span: slice, part: slice) -> slice:
    """The columns of ``part`` that are in ``span``, counted from the start of the part."""
    stop = max(0, min(span.stop, part.stop) - part.start)
    return slice(0, stop)
