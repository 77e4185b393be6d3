"""Prefix reuse under a patched model: what the store has of a prompt is loaded, what is new is published."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from kvtier.core.load_worth import RecomputeRate
from kvtier.core.policy import Need
from kvtier.core.resume import StoredRow, resume
from kvtier.errors import CapacityError, ConfigError, UnsupportedModelError
from kvtier.integrations.hf.fingerprint import fingerprint, rope_kinds
from kvtier.integrations.hf.match import Match
from kvtier.integrations.hf.prefix_use import PrefixUse, Restored
from kvtier.integrations.hf.stored_prompt import StoredPrompt, read_stored_prompt, unservable
from kvtier.integrations.hf.trail import Trail

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtier.core.memory import Memory
    from kvtier.core.namespace import Namespace
    from kvtier.core.session import Session
    from kvtier.core.store import Store
    from kvtier.integrations.hf.history import History
    from kvtier.integrations.hf.prompt import Prompt
    from kvtier.integrations.hf.state import CacheState

__all__ = ["PrefixCache"]

_LENGTH_DEPENDENT: Final = ("dynamic", "longrope")
_LOSSY: Final = "the policy is lossy: what follows the prompt is not what the model alone would have made"
_SEVERAL: Final = "of several continuations of a prompt none is published"
_DRAFTS: Final = "assisted decoding of transformers begins with an empty cache: nothing was loaded"
_ATTEMPTS: Final = 3
_LEAST_MEASURED: Final = 256  # tokens that a prefill must have to tell how fast the model is


class PrefixCache:
    """The store under one patched model.

    Parameters
    ----------
    model : PreTrainedModel
        The model itself, without an adapter around it.
    memory : Memory
        Where its sessions live; their sliding windows keep open chunks from now on.
    store : Store
        Shared with others; never closed here.
    tenant : str
        Whose prefixes these are.

    Raises
    ------
    ConfigError
        For a tenant that the store refuses, or chunks of another size than those of the sessions.

    Notes
    -----
    Safe to use from several threads, each with a cache of its own.
    """

    def __init__(self, model: PreTrainedModel, memory: Memory, store: Store, tenant: str) -> None:
        self.model = model
        self.memory = memory
        self.store = store
        self.tenant = tenant
        self._rate: RecomputeRate | None = None
        space = store.namespace(model=None, layout=memory.layout, tenant=tenant)
        if space.layout.chunk_tokens != memory.layout.chunk_tokens:
            raise ConfigError(
                f"sessions and store must agree on chunk_tokens, got {memory.layout.chunk_tokens} and "
                f"{space.layout.chunk_tokens}; make the memory from the store's configuration"
            )
        memory.keep_open_chunks()

    def begin(self, state: CacheState, call: dict[str, Any], prompt: Prompt, *, drafts: bool) -> int:
        """A ``generate`` begins: restore what is stored of its prompt, and get ready to publish the rest.

        Returns
        -------
        int
            Columns that need not run any more.
        """
        started = time.perf_counter()
        length = state.length
        if length or state.history.rows:
            self._go_on(state, call)
        else:
            state.prefix = self._start(state, call, prompt, drafts=drafts)
        use = state.prefix
        if use is None:
            return 0
        use.begin(started, tokens=prompt.tokens, prompt_end=length + prompt.columns)
        return use.restored.columns if length == 0 else 0

    def end(self, state: CacheState) -> None:
        """The ``generate`` is over; its prefill tells how fast the model computes."""
        use = state.prefix
        if use is None:
            return
        use.end()
        if use.measured is not None and use.measured[0] >= _LEAST_MEASURED and use.measured[1] > 0:
            self._rate = RecomputeRate(tokens_per_second=use.measured[0] / use.measured[1])

    def refill(self, state: CacheState, fed: History) -> int:
        """After lost pages: restore into an empty state what is stored of all that was fed; how many columns."""
        space = self._space()
        if isinstance(space, str) or fed.ids is None:
            return 0
        prompt = StoredPrompt(fed.ids, fed.real)
        if not prompt.left_padded or not torch.equal(fed.positions.masked_fill(~fed.real, 0), prompt.positions):
            return 0
        leave = prompt.columns if self._asks_about_all() else self._leave()
        restored = self._restore(state, space, prompt, leave=leave)
        state.prefix = PrefixUse(self._trail(space, restored, end=fed.length, spread=1))
        state.prefix.restored = restored
        state.prefix.resume_publishing()
        return restored.columns

    def widest(self, state: CacheState, prompt: Prompt) -> int | None:
        """The widest forward whose chunks fit the store's queue twice; None for any width.

        A policy that evicts does so layer by layer, and would have to hold all layers of a prompt that is cut.
        """
        if state.trail is None or state.trail.stopped or self.memory.policy.selection is not None:
            return None
        layout = self.memory.layout
        chunk_bytes = prompt.rows * layout.chunk_tokens * layout.token_bytes
        return max(1, self.store.publisher.capacity_bytes // 2 // chunk_bytes) * layout.chunk_tokens

    def _start(self, state: CacheState, call: dict[str, Any], prompt: Prompt, *, drafts: bool) -> PrefixUse:
        """Look up the prompt of an empty cache."""
        space = self._space()
        reason = unservable(self.model, call) or (space if isinstance(space, str) else "")
        stored = read_stored_prompt(self.model, call)
        if reason or isinstance(stored, str) or isinstance(space, str):
            return PrefixUse(reason=reason or str(stored))
        spread = prompt.rows // stored.ids.shape[0]
        whole = _DRAFTS if drafts else self._asks_about_all()
        leave = prompt.columns if whole else self._leave()
        restored = self._restore(state, space, stored.repeated(spread), leave=leave, spread=spread)
        trail = self._trail(space, restored, end=prompt.columns - int(drafts), spread=spread)
        use = PrefixUse(trail, whole if restored.tokens_matched else "")
        use.restored = restored
        return use

    def _trail(self, space: Namespace, restored: Restored, *, end: int, spread: int) -> Trail:
        """What publishes a cache whose prompt ends at column ``end``, and runs ``spread`` times."""
        if not self.memory.policy.lossless:
            trail = Trail(space, restored.stored_chunks, until=end, why=_LOSSY)
        elif spread > 1:
            trail = Trail(space, restored.stored_chunks, until=end, why=_SEVERAL)
        else:
            trail = Trail(space, restored.stored_chunks)
        if self.store.config.read_only:
            trail.stop("the store is open read-only")
        return trail

    def _go_on(self, state: CacheState, call: dict[str, Any]) -> None:
        """Another turn on a cache: what it publishes must still be of one model, and of token ids alone."""
        use = state.prefix
        if use is None:
            state.prefix = PrefixUse(reason="the cache was not empty")
            return
        use.restored = Restored()
        if use.trail is None or use.trail.stopped:
            return
        space = self._space()
        reason = unservable(self.model, call) or (space if isinstance(space, str) else "")
        if not reason and not isinstance(space, str) and space.digest != use.trail.space.digest:
            reason = "the model has changed since the cache was filled"
        if reason:
            use.trail.stop(reason)

    def _space(self) -> Namespace | str:
        """Where prefixes of the model as it is now belong, or why they cannot be stored."""
        kinds = sorted(kind for kind in rope_kinds(self.model) if kind.startswith(_LENGTH_DEPENDENT))
        if kinds:
            return f"keys depend on the length of the whole sequence ({kinds[0]} RoPE)"
        try:
            name = fingerprint(self.model)
        except UnsupportedModelError as error:
            return str(error)
        return self.store.namespace(model=name, layout=self.memory.layout, tenant=self.tenant)

    def _leave(self) -> int:
        """Columns at the end of a prompt that must run: one for its logits, or those a policy asks about."""
        selection = self.memory.policy.selection
        asked = selection.window_queries if selection is not None and self.memory.policy.keep is not None else 1
        return max(1, asked)

    def _asks_about_all(self) -> str:
        """Why every token of a prompt must run; empty when it need not."""
        selection = self.memory.policy.selection
        if selection is None or self.memory.policy.keep is None:
            return ""
        if Need.COLUMN_SUMS in selection.needs:
            return f"{selection.name} asks about the attention of every token of a prompt, so all of them must run"
        if Need.QUERY_MOMENTS in selection.needs:
            return f"{selection.name} asks about the query of every token of a prompt, so all of them must run"
        return ""

    def _restore(
        self, state: CacheState, space: Namespace, prompt: StoredPrompt, *, leave: int, spread: int = 1
    ) -> Restored:
        """Fill an empty state with what is stored of a prompt; of what proves damaged, with what comes before it."""
        result = Restored(stored_chunks=(0,) * prompt.ids.shape[0])
        for _ in range(_ATTEMPTS):
            with ExitStack() as leases:
                match = Match(space, prompt, self._rate, leases)
                result = Restored(
                    stored_chunks=match.stored_chunks,
                    tokens_matched=match.tokens // spread,
                    decision=match.decision,
                )
                columns = min(match.columns, prompt.columns - leave)
                rows = match.rows(columns)
                if rows is None:
                    continue
                if not any(row.tokens for row in rows):
                    break
                seconds = self._fill(state, rows, prompt, columns)
                if seconds is not None:
                    saved = sum(row.tokens for row in rows) // spread
                    return replace(result, columns=columns, tokens_saved=saved, load_seconds=seconds)
        return result

    def _fill(self, state: CacheState, rows: list[StoredRow], prompt: StoredPrompt, columns: int) -> float | None:
        """Restore rows; the seconds of reading, or None, with the state empty again, when that did not work."""
        try:
            seconds = resume(cast("Session", state.session), rows, columns, coming=prompt.columns)
        except (CapacityError, torch.OutOfMemoryError):
            # Computing the prompt may need less room at once; if it does not, it will say what is missing.
            seconds = None
        if seconds is None:
            state.restart()
        else:
            state.history.extend(prompt.head(columns), prompt.ids[:, :columns])
        return seconds
