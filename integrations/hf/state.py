"""The state of one cache: its session, what it was fed, and how far the running forward has come."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch

from kvtier.core.draft_tree import DraftTree, TreePath, rows_of_path
from kvtier.errors import InputError, MaskError, SessionStateError, UnsupportedModelError
from kvtier.integrations.hf.columns import Columns, read_columns
from kvtier.integrations.hf.drafting import Drafting
from kvtier.integrations.hf.filtered import Filtered
from kvtier.integrations.hf.history import History
from kvtier.integrations.hf.prefix_use import PrefixUse
from kvtier.integrations.hf.prompt import Split
from kvtier.integrations.hf.sessions import Memory, Session
from kvtier.integrations.hf.trail import Trail
from kvtier.types import LayerLayout

if TYPE_CHECKING:
    from kvtier.core.session import Session as CoreSession

__all__ = ["CacheState"]

_Given = tuple[torch.Tensor | None, torch.Tensor | None]


class CacheState:
    """A session as transformers counts it: in columns, complete forwards only.

    The cache and its layers share it, and it knows neither, so a dropped cache is freed at once. One thread at a time.

    Parameters
    ----------
    memory : Memory
        Where sessions come from.
    session, history : optional
        What a fork starts with; an empty cache without them.

    Attributes
    ----------
    fed : Tensor, optional
        Token ids [B, Tq] of the forward that is about to run; set before it, taken by its first layer.
    split : Split, optional
        How the forwards of the running ``generate`` are cut.
    waiting : Tensor, optional
        Token ids [B, Tq] of a forward that failed, after the state was rebuilt.
    broken, closed : bool
        Whether a rebuild failed; whether the session was freed.
    depth : int
        Layers that a forward runs through.
    records_past : bool
        Whether sliding-window layers keep what a crop may need.
    prefix : PrefixUse, optional
        What stored prefixes did for it, and what it publishes; None without a store.
    filtered : Filtered, optional
        The prompt as it was given, and what a filter left of it; None without a filter.
    drafting : Drafting, optional
        Drafted tokens that wait to be accepted, or are about to run.
    """

    def __init__(self, memory: Memory, session: Session | None = None, history: History | None = None) -> None:
        self.memory = memory
        self.session = memory.session() if session is None else session
        self.history = History() if history is None else history
        self.fed: torch.Tensor | None = None
        self.split: Split | None = None
        self.waiting: torch.Tensor | None = None
        self.broken = False
        self.closed = False
        self.records_past = False
        self.prefix: PrefixUse | None = None
        self.filtered: Filtered | None = None
        self.drafting: Drafting | None = None
        self.depth = len(memory.layout.layers)
        self._running: tuple[Columns, torch.Tensor | None] | None = None
        self._next_layer = 0
        self._read: list[tuple[_Given, Columns]] = []

    @property
    def length(self) -> int:
        """Columns of all complete forwards, padding included."""
        return self.history.length

    @property
    def trail(self) -> Trail | None:
        """What publishes the chunks of this cache, if anything does."""
        return None if self.prefix is None else self.prefix.trail

    @property
    def unfinished(self) -> bool:
        """Whether a forward, or a rebuild, began and did not come through."""
        return self._running is not None or self.broken

    @property
    def input_ids(self) -> torch.Tensor | None:
        """Token ids [B, T] given so far, those of an unfinished forward included; None when some are not known."""
        fed = self._fed_ids
        if fed is None or not fed.shape[0] or self.filtered is None:
            return fed
        return self.filtered.shown(fed)

    @property
    def _fed_ids(self) -> torch.Tensor | None:
        known = self.history.ids
        waiting = self.waiting if self._running is None else self._running[1]
        if known is None or (waiting is None and self._running is not None):
            return None
        if waiting is None:
            return known
        return torch.cat([known, waiting], dim=1) if self.history.rows else waiting

    def check_alive(self) -> None:
        """Refuse a cache that was closed.

        Raises
        ------
        SessionStateError
            After ``close``.
        """
        if self.closed:
            raise SessionStateError("this cache is closed; take another from handle.new_cache()")

    def check_ready(self) -> None:
        """Refuse a cache that cannot take another forward.

        Raises
        ------
        SessionStateError
            After ``close``, while drafted tokens are pending, and after a forward that did not come through.
        """
        self.check_alive()
        if self.drafting is not None and self.drafting.pending and self.drafting.tree is None:
            raise SessionStateError(
                "drafted tokens are pending; accept a path of them with cache.accept(path), or none: cache.accept([])"
            )
        if self.unfinished:
            raise SessionStateError(
                "the last forward on this cache failed half-way; call handle.recover(cache), or cache.reset() to start "
                "over"
            )

    def check_shapes(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> LayerLayout:
        """The layout of a layer, if K and V fit it.

        Raises
        ------
        UnsupportedModelError
            When the model makes other keys and values than its configuration says.
        """
        layout = self.memory.layout.layers[layer]
        required = (layout.num_kv_heads, layout.key_dim, layout.value_dim, layout.dtype)
        got = (key.shape[1], key.shape[3], value.shape[3], str(key.dtype).removeprefix("torch."))
        if got != required or value.shape[:3] != key.shape[:3] or value.dtype != key.dtype:
            raise UnsupportedModelError(
                f"layer {layer} must make keys and values of (KV heads, key dim, value dim, dtype) {required}, "
                f"got {got}; load the model in one dtype, and without autocast"
            )
        return layout

    def begin(
        self, layer: int, mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, width: int
    ) -> Columns:
        """The columns of the running forward, as layer ``layer`` joins it; read once per mask and positions.

        Raises
        ------
        MaskError
            For a mask or positions that paging cannot honour.
        SessionStateError
            When layers come out of order, or an earlier forward did not finish.
        """
        if layer == 0:
            self._open_forward(mask, position_ids, batch, width)
        elif layer != self._next_layer:
            raise SessionStateError(
                f"layer {self._next_layer} must attend next, got layer {layer}; layers run once and in order"
            )
        for (seen_mask, seen_positions), columns in self._read:
            if seen_mask is mask and seen_positions is position_ids:
                return columns
        columns = read_columns(mask, position_ids, batch=batch, start=self.length, width=width)
        if columns.spans != self._read[0][1].spans:
            raise MaskError(
                f"all layers must see the same padding, but the mask of layer {layer} differs from that of layer 0"
            )
        self._read.append(((mask, position_ids), columns))
        return columns

    def appended(self, layer: int, query: torch.Tensor) -> None:
        """Layer ``layer`` holds the forward's tokens and has not attended with ``query`` [B, Hq, Tq, Dk] yet."""
        del query
        if self.trail is not None:
            self.trail.collect(cast("CoreSession", self.session), layer)

    def finish(self, layer: int) -> None:
        """Layer ``layer`` has attended; after the last one the columns count."""
        self._next_layer = layer + 1
        if self._next_layer == self.depth and self._running is not None:
            self.history.extend(*self._running)
            self._forget_forward()
            if self.trail is not None:
                self.trail.close()

    def begin_drafts(self, tree: DraftTree) -> None:
        """The next forward brings drafted tokens."""
        self.check_alive()
        if self.drafting is None:
            self.check_ready()
            if not self.history.rows:
                raise SessionStateError("drafted tokens follow a prompt, and this cache is empty; run a forward first")
            self.drafting = Drafting(self.history)
        self.drafting.begin(tree)

    def attend_drafts(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, softmax: dict[str, Any]
    ) -> torch.Tensor | None:
        """Attention [B, Hq, Tq, Dv] of the drafted tokens that the running forward brings; None when it brings none."""
        drafting = self.drafting
        if drafting is None or drafting.tree is None:
            return None
        positions = drafting.positions_on(query.device)
        self.session.append(layer, key, value, positions, tree=drafting.tree)
        out = self.session.attend(layer, query, positions, **softmax)
        if layer == self.depth - 1:
            drafting.fed(self.fed)
        return out

    def drop_drafts(self) -> None:
        """Forget what is drafted; a session that failed for good has forgotten it already."""
        pending, self.drafting = self.session.drafted, None
        if pending:
            with contextlib.suppress(SessionStateError):
                self.session.accept([])

    def accept(self, path: TreePath) -> None:
        """Append the drafted tokens of a path, or of one for each row, and forget the others."""
        if self.drafting is None or not self.drafting.pending:
            raise SessionStateError("nothing is drafted; run a forward in cache.drafts(parents) first")
        self.session.accept(path)
        drafting, self.drafting = self.drafting, None
        paths = rows_of_path(path, self.history.rows)
        if any(paths):
            self.history.extend(*drafting.accepted(paths))
            if self.trail is not None:
                self.trail.stop("the cache was fed outside of generate()")

    def reorder(self, rows: list[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        if rows != list(range(self.history.rows)) and self.history.rows:
            self.session.reorder(rows)
            self.history.reorder(rows)
            self.filtered = None if self.filtered is None else self.filtered.reordered(rows)
            if self.trail is not None:
                self.trail.reorder(rows)

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` columns."""
        if remove > self.length:
            raise InputError(f"the cache holds {self.length} columns, cannot forget {remove}")
        self.session.crop(remove)
        self.history.crop(remove)
        if self.trail is not None:
            self.trail.crop(self.history)

    def record_past(self, record: bool) -> None:
        """Keep, in sliding-window layers, what a crop may need; or no longer."""
        self.records_past = record
        self.session.record_past(record)

    def fork(self) -> CacheState:
        """A second state that grows apart."""
        self.check_ready()
        twin = CacheState(self.memory, self.session.fork(), self.history.copy())
        twin.prefix = None if self.prefix is None else self.prefix.fork()
        twin.filtered = self.filtered
        return twin

    def restart(self) -> tuple[History, torch.Tensor | None]:
        """Put an empty session in place of this one; return what that was fed, and the ids of a failed forward."""
        fed = self.history
        failed = self.waiting if self._running is None else self._running[1]
        self.session.close()
        self.session = self.memory.session()
        if self.records_past:
            self.session.record_past(True)
        self.history, self.waiting, self.broken, self.prefix = History(), None, False, None
        self.drafting = None
        self._forget_forward()
        return fed, failed

    def break_off(self, fed: History, failed: torch.Tensor | None) -> None:
        """A restart failed half-way: remember what was fed, so that it can be tried again."""
        self._forget_forward()
        self.history, self.waiting, self.broken = fed, failed, True

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self.closed = True
        self.session.close()

    def _open_forward(
        self, mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, width: int
    ) -> None:
        self.check_ready()
        if self.history.rows and batch != self.history.rows:
            raise InputError(
                f"the cache holds {self.history.rows} rows, got a batch of {batch}; use one cache per batch"
            )
        columns = read_columns(mask, position_ids, batch=batch, start=self.length, width=width)
        self.history.check(mask, columns)
        ids, self.fed = self.fed, None
        fits = ids is not None and tuple(ids.shape) == (batch, width)
        self.waiting = None
        self._running = (columns, ids.cpu() if ids is not None and fits else None)
        self._read = [((mask, position_ids), columns)]
        if self.trail is not None:
            self.trail.open(self.history, *self._running)

    def _forget_forward(self) -> None:
        self._running = None
        self._next_layer = 0
        self._read = []
