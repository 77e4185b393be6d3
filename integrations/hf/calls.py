"""What a patched model does around its own ``generate`` and before its own ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvtier.errors import InputError, PagesLostError, SessionStateError, UnsupportedModelError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.cache import KVTierCache
from kvtier.integrations.hf.filter import PromptFilter, Turn
from kvtier.integrations.hf.history import History
from kvtier.integrations.hf.pool import CachePool
from kvtier.integrations.hf.probe import ProbeCache
from kvtier.integrations.hf.prompt import Prompt, Split, read_prompt, split_forward
from kvtier.integrations.hf.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtier.integrations.hf.prefix import PrefixCache
    from kvtier.integrations.hf.state import CacheState

__all__ = ["PatchedCalls", "arguments_by_name"]


class PatchedCalls:
    """Gives every call of a patched model the right cache, and refuses what paging cannot honour before anything runs.

    Parameters
    ----------
    model : PreTrainedModel
        The model itself, without an adapter around it.
    pool : CachePool
        Where its caches come from.
    prefix : PrefixCache, optional
        The store under it.
    filtering : PromptFilter, optional
        What leaves tokens of a prompt out before anything else sees it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: CachePool,
        prefix: PrefixCache | None = None,
        filtering: PromptFilter | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.prefix = prefix
        self.filtering = filtering

    def generate(self, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        """Run ``original(**call)`` with a cache of ours.

        Raises
        ------
        InputError, MaskError
            For a prompt that cannot run.
        UnsupportedModelError
            For a cache or an option that is not served.
        """
        self._refuse_options(call)
        given = call.get("past_key_values")
        if given is None and compat.generation_option(self.model, "use_cache", call) is False:
            turn = self._turn(call, None)
            read_prompt(self.model, turn.call, cached=0)
            return turn.splice(original(**turn.call))
        cache = self.pool.new_cache() if given is None else self.check_cache(given)
        try:
            output = self._generate_on(cache, original, call)
        except PagesLostError:
            self.pool.keep_lost(cache)
            raise
        except BaseException:
            if given is None:
                cache.close()
            raise
        if given is None and getattr(output, "past_key_values", None) is not cache:
            cache.close()
        return output

    def forward(self, module: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``forward`` with a cache of ours; a forward too wide for the device has its head run first.

        Raises
        ------
        InputError, SessionStateError, UnsupportedModelError
            For attention weights, a model in training mode, and caches of others.
        """
        if module.training:
            raise SessionStateError("kvtier serves inference, and this model is in training mode; call model.eval()")
        if call.get("output_attentions"):
            raise InputError("paged attention has no attention weights; leave out output_attentions=True")
        stage.clear()
        given = call.get("past_key_values")
        if isinstance(given, ProbeCache):
            return call
        if given is None:
            wanted = call.get("use_cache")
            if not (getattr(compat.text_config(self.model), "use_cache", True) if wanted is None else wanted):
                return call
            given = self.pool.new_cache()
            call = {**call, "past_key_values": given}
        cache = self.check_cache(given)
        cache.state.check_ready()
        self.pool.use(cache)
        if cache.state.prefix is not None:
            cache.state.prefix.past(cache.state.length)
        split = cache.state.split
        if module is self.model and split is not None:
            # The parts are forwards of their own and come by here again.
            cache.state.split = None
            call = split_forward(self.model, call, cache.state.length, split)
            cache.state.split = split
        cache.state.fed = call.get("input_ids")
        drafting = cache.state.drafting
        return call if drafting is None or drafting.tree is None else drafting.prepare(call)

    def rebuild(self, cache: KVTierCache) -> None:
        """Run the model over what a cache was fed, into a new session; if that fails, it can be tried again."""
        state = cache.state
        fed, failed = state.restart()
        try:
            if fed.length:
                self._prefill(cache, fed)
        except BaseException:
            state.break_off(fed, failed)
            raise
        state.waiting = failed

    def check_cache(self, cache: object) -> KVTierCache:
        """The cache, if this pool made it.

        Raises
        ------
        UnsupportedModelError
            For any other.
        """
        if not isinstance(cache, KVTierCache):
            raise UnsupportedModelError(
                f"a patched model takes past_key_values=handle.new_cache(), or none, got {type(cache).__name__}"
            )
        if cache.memory is not self.pool.memory:
            raise UnsupportedModelError(
                "this cache belongs to another handle; pass one from this handle's new_cache(), or none"
            )
        return cache

    def _turn(self, call: dict[str, Any], state: CacheState | None) -> Turn:
        """The call as it is to be run: without the tokens that a prompt filter leaves out."""
        return Turn(call) if self.filtering is None else self.filtering.turn(call, state)

    def _generate_on(self, cache: KVTierCache, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        state = cache.state
        state.check_ready()
        turn = self._turn(call, state)
        call = turn.call
        prompt = read_prompt(self.model, call, state.length)
        drafts = self._drafts(call)
        assisting = bool(compat.generation_option(self.model, "is_assistant", call))
        if assisting:
            cache.activate_past_recording()
        try:
            # An assistant is called again and again for a few tokens more: only its first call brings a prompt.
            if not (state.length and assisting):
                prompt = self._announce(state, call, prompt, drafts=drafts)
            chunk = self._chunk(state, prompt, call)
            state.split = Split(chunk, apart=drafts) if drafts or chunk is not None else None
            call = {**call, "past_key_values": cache}
            if chunk is not None:
                # transformers 5.16 cuts a continued prompt wrongly, every version an embedded one: forward() cuts
                # those.
                call["prefill_chunk_size"] = chunk if state.length == 0 and prompt.has_ids else None
            self.pool.use(cache)
            output = original(**call)
            if state.prefix is not None:
                state.prefix.past(state.length)
            return turn.splice(output)
        finally:
            state.split = None
            if self.prefix is not None:
                self.prefix.end(state)

    def _announce(self, state: CacheState, call: dict[str, Any], prompt: Prompt, *, drafts: bool) -> Prompt:
        """Restore what is stored of a prompt and tell the session of the rest, which is returned."""
        if self.prefix is not None:
            restored = self.prefix.begin(state, call, prompt, drafts=drafts)
            prompt = replace(prompt, columns=prompt.columns - restored)
        announced = prompt.columns - 1 if drafts else prompt.columns
        if announced:
            state.session.expect(announced)
        return prompt

    @torch.no_grad()
    def _prefill(self, cache: KVTierCache, fed: History) -> None:
        device = compat.module_device(self.model.get_input_embeddings())
        start = 0 if self.prefix is None else self.prefix.refill(cache.state, fed)
        call: dict[str, Any] = {
            "input_ids": None if fed.ids is None else fed.ids[:, start:].to(device),
            "attention_mask": None if bool(fed.real.all()) else fed.real.to(device),
            "position_ids": fed.positions[:, start:].to(device),
            "past_key_values": cache,
            "use_cache": True,
        }
        if compat.keeps_logits(self.model):
            call["logits_to_keep"] = 1
        cache.session.expect(fed.length - start)
        cache.state.split = Split(self.pool.memory.max_prefill_chunk(fed.rows))
        try:
            self.model(**call)
        finally:
            cache.state.split = None
            if self.prefix is not None:
                self.prefix.end(cache.state)

    def _chunk(self, state: CacheState, prompt: Prompt, call: dict[str, Any]) -> int | None:
        """The widest forward allowed, in columns: the least of the caller's wish, the device and the store's queue."""
        wished = compat.generation_option(self.model, "prefill_chunk_size", call)
        limits = [self.pool.memory.max_prefill_chunk(prompt.rows)]
        if self.prefix is not None:
            limits.append(self.prefix.widest(state, prompt))
        if wished is None and all(limit is None or limit >= prompt.columns for limit in limits):
            return None
        return min(int(limit) for limit in (wished, *limits) if limit is not None)

    def _drafts(self, call: dict[str, Any]) -> bool:
        """Whether ``generate`` will feed tokens that it may take back."""
        options = ("assistant_model", "prompt_lookup_num_tokens")
        return any(compat.generation_option(self.model, name, call) is not None for name in options)

    def _refuse_options(self, call: dict[str, Any]) -> None:
        kind = compat.generation_option(self.model, "cache_implementation", call)
        # "hybrid" is what configurations of older models say; transformers itself ignores it.
        if kind not in (None, "hybrid"):
            raise UnsupportedModelError(
                f"a patched model brings its own cache, got cache_implementation={kind!r}; leave it out"
            )
        if compat.generation_option(self.model, "output_attentions", call):
            raise InputError("paged attention has no attention weights; leave out output_attentions=True")
        if compat.generation_option(self.model, "assistant_early_exit", call) is not None:
            raise UnsupportedModelError(
                "assistant_early_exit runs half of the layers; use an assistant model or prompt lookup"
            )


def arguments_by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """One dict of a call's arguments; those given by position get their names."""
    if not args:
        return kwargs
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}
