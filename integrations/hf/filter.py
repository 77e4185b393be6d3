"""Prompt filters under ``generate``: a shorter prompt is run, and the one that was given stands in the result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvtier.errors import InputError, UnsupportedModelError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.filtered import Filtered
from kvtier.integrations.hf.probe import last_query_votes, surprisal_votes
from kvtier.integrations.hf.prompt import read_prompt
from kvtier.integrations.hf.stored_prompt import StoredPrompt, read_stored_prompt, unservable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtier.core.filtering import BoundFilter
    from kvtier.integrations.hf.pool import CachePool
    from kvtier.integrations.hf.state import CacheState

__all__ = ["PromptFilter", "Turn"]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One call of ``generate``: the arguments that are run, and the way back.

    Parameters
    ----------
    call : dict
        Arguments by name.
    given, run_columns : Tensor and int, optional
        Ids [B, T] as they were given, and how many columns are run in their place; None when they are run as they are.
    """

    call: dict[str, Any]
    given: torch.Tensor | None = None
    run_columns: int = 0

    def splice(self, output: Any) -> Any:
        """What ``generate`` returned, with the ids that were given in front of the new ones."""
        if self.given is None:
            return output
        if isinstance(output, torch.Tensor):
            return self._spliced(self.given, output)
        output["sequences"] = self._spliced(self.given, output["sequences"])
        return output

    def _spliced(self, given: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        before = given.to(sequences.device).repeat_interleave(sequences.shape[0] // given.shape[0], dim=0)
        return torch.cat([before, sequences[:, self.run_columns :]], dim=1)


class PromptFilter:
    """The prompt filter of one patched model.

    It acts on the prompt that begins a cache; what later turns bring is run whole.

    Parameters
    ----------
    model : PreTrainedModel
        The model itself, without an adapter around it.
    pool : CachePool
        Its caches, over a memory of the core.
    bound : BoundFilter
        What chooses.

    Notes
    -----
    Threads may share it: it holds no state but that of the caches it is given.
    """

    def __init__(self, model: PreTrainedModel, pool: CachePool, bound: BoundFilter) -> None:
        self.model = model
        self.pool = pool
        self.bound = bound

    def turn(self, call: dict[str, Any], state: CacheState | None) -> Turn:
        """The next call of ``generate`` on a cache, or on none, as it is to be run.

        Raises
        ------
        InputError, MaskError
            For a prompt that cannot be filtered, or is not the one that the cache began with.
        UnsupportedModelError
            For an assistant: it must see what its model sees.
        """
        if compat.generation_option(self.model, "is_assistant", call):
            raise UnsupportedModelError(
                f"{self.bound.policy.name} gives an assistant another prompt than its model has; patch the assistant "
                "with 'full'"
            )
        if state is not None and state.length:
            return self._next(call, state)
        ids = _ids(call)
        if ids is None and call.get("inputs_embeds") is None:
            return Turn(call)
        spread = read_prompt(self.model, call, cached=0).rows // (1 if ids is None else ids.shape[0])
        filtered = self._filter(self._readable(call))
        if state is not None:
            state.filtered = filtered.repeated(spread)
        if filtered.whole or ids is None:
            return Turn(call)
        mask = filtered.run.real.long()
        return self._rewritten(call, ids, filtered.run.ids, mask, removed=ids.shape[1] - filtered.run.columns)

    def _next(self, call: dict[str, Any], state: CacheState) -> Turn:
        """A turn on a cache that holds a filtered prompt: what comes after it is run as it is."""
        filtered, ids = state.filtered, _ids(call)
        if filtered is None or filtered.whole or ids is None:
            return Turn(call)
        columns, mask = filtered.given.columns, call.get("attention_mask")
        removed = columns - filtered.run.columns
        real = filtered.run.real.to(ids.device)
        if mask is not None:
            if mask.shape[0] != real.shape[0] or mask.shape[1] < columns:
                raise InputError(
                    f"the attention_mask must cover the {columns} columns of the prompt that this cache of "
                    f"{real.shape[0]} rows began with, got {list(mask.shape)}"
                )
            mask = torch.cat([real.to(mask), mask[:, columns:]], dim=1)
            if mask.shape[1] + removed > ids.shape[1]:
                return Turn({**call, "attention_mask": mask})
        self._check_begins(ids, filtered.given)
        run = torch.cat([filtered.run.ids.to(ids), ids[:, columns:]], dim=1)
        return self._rewritten(call, ids, run, mask, removed=removed)

    def _rewritten(
        self, call: dict[str, Any], given: torch.Tensor, run: torch.Tensor, mask: torch.Tensor | None, *, removed: int
    ) -> Turn:
        name = "inputs" if call.get("inputs") is not None else "input_ids"
        changed = {**call, name: run.to(given), **compat.shorter(self.model, call, removed)}
        if mask is not None:
            changed["attention_mask"] = mask.to(given.device)
        if call.get("streamer") is not None:
            changed["streamer"] = _Streamer(call["streamer"], given)
        return Turn(changed, given, run.shape[1])

    def _readable(self, call: dict[str, Any]) -> StoredPrompt:
        reason = unservable(self.model, call)
        prompt = read_stored_prompt(self.model, call)
        if reason or isinstance(prompt, str):
            raise InputError(
                f"{self.bound.policy.name} chooses among the token ids of a prompt, and {reason or prompt}; use a "
                "policy that filters no prompt, or give input_ids and attention_mask alone"
            )
        return prompt

    def _filter(self, prompt: StoredPrompt) -> Filtered:
        """Vote and choose; a prompt that fits the budget as it is needs no votes."""
        started = time.perf_counter()
        rows, keep = range(prompt.ids.shape[0]), self.bound.keep
        if int(prompt.real.sum(dim=1).max()) <= keep:
            whole = [torch.arange(prompt.row(row).numel()) for row in rows]
            return Filtered.of(prompt, whole, (), 0.0)
        if self.bound.layer is None:
            votes = surprisal_votes(self.model, self.pool, prompt)
        else:
            votes = last_query_votes(self.model, self.pool, prompt, self.bound.layer)
        kept = [self.bound.plan(prompt.row(row), votes[row]) for row in rows]
        return Filtered.of(prompt, kept, votes, time.perf_counter() - started)

    def _check_begins(self, ids: torch.Tensor, prompt: StoredPrompt) -> None:
        """Refuse ids that do not begin with the prompt that was filtered: their columns could not be told."""
        begin = ids[:, : prompt.columns].cpu()
        if begin.shape != prompt.ids.shape or not torch.equal(begin[prompt.real], prompt.ids[prompt.real]):
            raise InputError(
                f"this cache began with a prompt of {list(prompt.ids.shape)} ids, of which {self.bound.policy.name} "
                f"ran a part, and the ids given now ({list(ids.shape)}) do not begin with it; give all of them, or "
                "a new cache"
            )


class _Streamer:
    """Passes tokens on, with the prompt as it was given in place of the one that is run."""

    def __init__(self, listener: Any, given: torch.Tensor) -> None:
        self._listener = listener
        self._given: torch.Tensor | None = given

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, which comes first, or new tokens."""
        given, self._given = self._given, None
        self._listener.put(value if given is None else given.cpu())

    def end(self) -> None:
        """Pass the end on."""
        self._listener.end()


def _ids(call: dict[str, Any]) -> torch.Tensor | None:
    ids: torch.Tensor | None = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    return ids
