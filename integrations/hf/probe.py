"""The first run of a prompt filter: the prompt through some layers, for votes on its tokens, and nothing that stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import torch

from kvtier.core.probe import run_logits
from kvtier.errors import UnsupportedModelError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.cache import KVTierCache
from kvtier.integrations.hf.columns import Columns
from kvtier.integrations.hf.state import CacheState
from kvtier.integrations.hf.stateless import attend_stateless

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtier.core.memory import Memory
    from kvtier.integrations.hf.pool import CachePool
    from kvtier.integrations.hf.sessions import Session as AnySession
    from kvtier.integrations.hf.stored_prompt import StoredPrompt

__all__ = ["ProbeCache", "last_query_votes", "surprisal_votes"]

_LOGITS_BYTES: Final = 128 << 20
"""Of one forward whose logits are all wanted, in fp32."""


class _ReachedError(Exception):
    """The layer that votes has its keys; nothing behind it needs to run."""


class _ProbeSession(Protocol):
    """A session that can also say what one query makes of the keys of a layer."""

    def logits(self, layer: int, query: torch.Tensor) -> list[torch.Tensor]: ...


class ProbeCache(KVTierCache):
    """A cache that lives for one probe; it is not reported and not published."""


class _ProbeState(CacheState):
    """Forwards through the first layers; the last of them has the last query vote, and ends the forward.

    Parameters
    ----------
    layer : int
        The layer that votes.
    columns : int
        Columns of the prompt.
    """

    def __init__(self, memory: Memory, session: AnySession, *, layer: int, columns: int) -> None:
        super().__init__(memory, session)
        self.depth = layer + 1
        self.votes: list[torch.Tensor] | None = None
        self._columns = columns

    def appended(self, layer: int, query: torch.Tensor) -> None:
        """The layer that votes need not attend."""
        if layer + 1 < self.depth:
            return
        self.finish(layer)
        if self.length == self._columns:
            self.votes = cast("_ProbeSession", self.session).logits(layer, query[:, :, -1:])
        raise _ReachedError


class _Passing:
    """A session of one forward: a layer's keys and values are gone when it has attended."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._held: tuple[int, torch.Tensor, torch.Tensor, Sequence[slice] | None] | None = None
        self.rows = 0

    def expect(self, tokens: int) -> None:
        """Nothing is planned."""

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        *,
        spans: Sequence[slice] | None = None,
    ) -> None:
        """Hold one layer, counted as the model's own."""
        del positions
        self._drop()
        with self._memory.lock:
            self._memory.ledger_of[layer].take("raw", k.nbytes + v.nbytes)
        self._held = layer, k, v, spans
        self.rows = k.shape[0]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        positions: torch.Tensor,
        *,
        spans: Sequence[slice] | None = None,
        **softmax: Any,
    ) -> torch.Tensor:
        """Attention over the layer that is held."""
        _, k, v, _ = self._layer(layer)
        held = None if spans is None else tuple(spans)
        out = attend_stateless(q, k, v, Columns(positions, None, held), **softmax)
        self._drop()
        return out

    def logits(self, layer: int, query: torch.Tensor) -> list[torch.Tensor]:
        """q.k of one query a row with the tokens of its row, as `Session.logits`."""
        _, k, _, spans = self._layer(layer)
        found = []
        for row in range(self.rows):
            keys = k[row] if spans is None else k[row, :, spans[row]]
            found.append(torch.empty(keys.shape[1], dtype=torch.float32, device=keys.device))
            run_logits(query[row], keys, found[-1])
        return found

    def close(self) -> None:
        """Let go of what a forward that stopped left behind."""
        self._drop()

    def _layer(self, layer: int) -> tuple[int, torch.Tensor, torch.Tensor, Sequence[slice] | None]:
        if self._held is None or self._held[0] != layer:
            raise UnsupportedModelError(f"layer {layer} attends before it has keys; a prompt filter cannot serve that")
        return self._held

    def _drop(self) -> None:
        if self._held is not None:
            layer, k, v, _ = self._held
            with self._memory.lock:
                self._memory.ledger_of[layer].give("raw", k.nbytes + v.nbytes)
        self._held = None


@torch.no_grad()
def last_query_votes(model: PreTrainedModel, pool: CachePool, prompt: StoredPrompt, layer: int) -> list[torch.Tensor]:
    """What the last query of each row sees in one layer: q.k over the query heads, [tokens of the row] fp32 on the CPU.

    No layer behind it runs. A prompt that fits the device in one forward leaves no keys behind on its way; one that
    does not keeps, until the votes are cast, those of the layers before, in the tiers of the memory.

    Raises
    ------
    UnsupportedModelError
        When the model's forward ends without coming to that layer.
    """
    memory = cast("Memory", pool.memory)
    width = memory.max_prefill_chunk(prompt.ids.shape[0]) or prompt.columns
    session = _session(memory, prompt, width, layers=layer + 1)
    state = _ProbeState(memory, session, layer=layer, columns=prompt.columns)
    try:
        for start in range(0, prompt.columns, width):
            try:
                _forward(model, ProbeCache(state, pool), prompt, start, start + width, logits=1)
            except _ReachedError:
                continue
            raise UnsupportedModelError(
                f"the forward of {type(model).__name__} ended without kvtier's attention in layer {layer}, so its "
                "layers cannot be stopped there; use a policy that filters no prompt"
            )
    finally:
        state.close()
    return [votes.cpu() for votes in state.votes or ()]


@torch.no_grad()
def surprisal_votes(model: PreTrainedModel, pool: CachePool, prompt: StoredPrompt) -> list[torch.Tensor]:
    """How little the model expected each token of each row: -log p in nats, [tokens of the row] fp32 on the CPU.

    Nothing predicts the first token of a row: it counts as much as the most surprising one.
    """
    memory = cast("Memory", pool.memory)
    rows, columns = prompt.ids.shape
    fitting = memory.max_prefill_chunk(rows) or columns
    width = min(fitting, max(1, _LOGITS_BYTES // (4 * rows * compat.text_config(model).vocab_size)))
    state = CacheState(memory, _session(memory, prompt, width, layers=len(memory.layout.layers)))
    nats = torch.zeros(rows, columns)
    before: torch.Tensor | None = None
    try:
        for start in range(0, columns, width):
            output = _forward(model, ProbeCache(state, pool), prompt, start, start + width, logits=None)
            logits = output.logits.float()
            stop = start + logits.shape[1]
            nats[:, start + 1 : stop] = _nats(logits[:, :-1], prompt.ids[:, start + 1 : stop])
            if before is not None:
                nats[:, start : start + 1] = _nats(before, prompt.ids[:, start : start + 1])
            before = logits[:, -1:].clone()
    finally:
        state.close()
    return [_of_row(nats[row], prompt.real[row]) for row in range(rows)]


def _nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """-log p of ids [B, n] under logits [B, n, V]."""
    said = logits.gather(2, ids.to(logits.device)[:, :, None])[:, :, 0]
    return (logits.logsumexp(-1) - said).cpu()


def _of_row(nats: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    own = nats[real].clone()
    own[0] = own[1:].max() if own.numel() > 1 else 0.0
    return own


def _session(memory: Memory, prompt: StoredPrompt, width: int, *, layers: int) -> AnySession:
    """What holds the keys of the prompt between forwards of ``width`` columns; nothing, when there is only one."""
    if width >= prompt.columns:
        return cast("AnySession", _Passing(memory))
    return memory.probe(layers=layers, columns=prompt.columns)


def _forward(
    model: PreTrainedModel, cache: ProbeCache, prompt: StoredPrompt, start: int, stop: int, *, logits: int | None
) -> Any:
    """The model over columns ``start`` to ``stop``, with the logits of the last ``logits`` of them; None for all."""
    device = compat.module_device(model.get_input_embeddings())
    stop = min(stop, prompt.columns)
    padded = not bool(prompt.real.all())
    call: dict[str, Any] = {
        "input_ids": prompt.ids[:, start:stop].to(device),
        "attention_mask": prompt.real[:, :stop].long().to(device) if padded else None,
        "position_ids": prompt.positions[:, start:stop].to(device),
        "past_key_values": cache,
        "use_cache": True,
    }
    if logits is not None and compat.keeps_logits(model):
        call["logits_to_keep"] = logits
    return model(**call)
