"""KVTierCache: a transformers cache whose keys and values live in a kvtier session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtier.core.draft_tree import DraftTree, Parents, TreePath
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.stage import Staged, stage
from kvtier.integrations.hf.state import CacheState

if TYPE_CHECKING:
    from kvtier.integrations.hf.pool import CachePool
    from kvtier.integrations.hf.sessions import Memory, Session

__all__ = ["KVTierCache", "KVTierLayer"]


class KVTierLayer(CacheLayerMixin):
    """One layer, as transformers sees it: it answers lengths and stages K and V; the cache does the rest."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, state: CacheState, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.is_sliding = state.memory.layout.layers[index].window is not None
        self._state = state
        self._index = index

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first forward."""
        return self._state.history.rows or -1

    @property
    def record_past(self) -> bool:
        """Whether sliding-window layers keep what a crop may need."""
        return self._state.records_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self._state.record_past(record)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate nothing: the session allocates pages as tokens come."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage key [B, Hk, Tq, Dk] and value [B, Hk, Tq, Dv] for the attention function; return them untouched."""
        self._state.check_alive()
        stage.put(Staged(self._state, self._index, key_states, value_states))
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self._state.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: all columns, from the first."""
        return self._state.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class KVTierCache(Cache):
    """A cache for one batch of sequences; ``handle.new_cache()`` makes them.

    Pass it as ``past_key_values``. One thread at a time; ``copy.deepcopy`` forks it, sharing pages if the memory can.

    Attributes
    ----------
    state : CacheState
        The session and what it was fed.
    """

    def __init__(self, state: CacheState, pool: CachePool) -> None:
        super().__init__(layers=[KVTierLayer(state, index) for index in range(len(state.memory.layout.layers))])
        self.state = state
        self._pool = pool

    @property
    def memory(self) -> Memory:
        """The memory that this cache belongs to."""
        return self.state.memory

    @property
    def session(self) -> Session:
        """The session behind the cache."""
        return self.state.session

    @property
    def input_ids(self) -> torch.Tensor | None:
        """Token ids [B, T] int64 fed so far, on the CPU; None when some came as embeddings."""
        return self.state.input_ids

    @property
    def padding(self) -> torch.Tensor:
        """The attention mask [B, T] int64 of what was fed, on the CPU: 1 for tokens, 0 for padding."""
        return self.state.history.real.long()

    @contextmanager
    def drafts(self, parents: DraftTree | Parents | Sequence[Parents]) -> Iterator[None]:
        """The forward in here brings drafted tokens, a tree of them; ``accept`` says which are kept.

        ``input_ids`` [B, N] are the drafted tokens alone. Each sees all that is cached, those above it in the tree and
        itself; its position is one behind that of the token it follows, and need not be given. Another ``drafts``
        before ``accept`` goes on with the same tree.

        Parameters
        ----------
        parents : sequence
            Of each drafted token the number of the one it follows, None for one that follows the last cached token:
            ``[None, 0, 0, 1]``; or such a list for each row. Rows with fewer tokens are padded on the right.

        Raises
        ------
        InputError, SessionStateError
            For what is no tree; for a cache without tokens, or closed. After an error in here nothing is drafted.
        """
        self.state.begin_drafts(DraftTree.of(parents))
        try:
            yield
        except BaseException:
            self.state.drop_drafts()
            raise
        if self.state.drafting is not None:
            self.state.drafting.end()

    def accept(self, path: TreePath) -> None:
        """Keep the drafted tokens of a path, as if only those had been fed, and forget the others.

        Parameters
        ----------
        path : sequence of int, or one for each row
            Numbers of drafted tokens, from one without a parent downwards; ``[]`` keeps none. Rows whose paths are
            shorter are padded on the right, and later forwards need an attention mask that says so: ``padding``.

        Raises
        ------
        InputError, SessionStateError
            For what is no path of the tree, or when nothing is drafted; nothing changed.
        """
        self.state.accept(path)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, in all layers at once."""
        self.state.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        self.state.reorder([row for row in range(self.state.history.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that ``indices`` (numbers or a bool mask) selects."""
        self.state.reorder(torch.arange(self.state.history.rows)[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns of every row; transformers writes their number as a negative one."""
        self.state.crop(compat.columns_to_remove(int(tokens_to_remove), self.state.length))

    def activate_past_recording(self) -> None:
        """Keep, in sliding-window layers, what a crop may need."""
        self.state.record_past(True)

    def reset(self) -> None:
        """Forget everything and start over with an empty session."""
        self.state.restart()
        self.state.filtered = None
        for layer in self.layers:
            if isinstance(layer, KVTierLayer):
                layer.is_initialized = False

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._pool.close(self.state)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVTierCache:
        return self._pool.wrap(self.state.fork())
