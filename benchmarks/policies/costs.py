"""What policies cost in one layer of the size of Llama 3 8B: planning in a decode step, statistics in a long prompt."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import wraps
from types import TracebackType
from typing import Any, Final, Self

import torch

import kvtier
from benchmarks.policies.settings import Settings
from benchmarks.timing import Competitor, Limits, contest, timing_of
from benchmarks.workload import Shape, feed_prompt, random_kv
from kvtier.config import StoreConfig
from kvtier.core import slot_eviction
from kvtier.integrations.hf.columns import Columns

__all__ = ["planning", "statistics"]

_STEPWISE: Final = ("streamingllm", "tova", "h2o(recent=64)", "d2o(when='step')")
_ASKING: Final = ("full", "h2o(recent=64)", "d2o")
_VOCABULARY: Final = 256


def planning(settings: Settings) -> list[dict[str, Any]]:
    """Of a decode step of policies that evict in every step: planning alone, and all that eviction costs."""
    model, shape = _layer(settings)
    keep = settings.plan_context // settings.share
    prompt = random_kv(shape, settings.plan_context)
    rows = []
    for words in _STEPWISE:
        with _patched(model, words, keep) as (patched, cache):
            cache.session.expect(settings.plan_context)
            feed_prompt(cache.session, 0, prompt, shape)
            _told(cache)
            plans = _Clock(slot_eviction, "told_by_rule")
            evictions = _Clock(slot_eviction, "evict_step")
            steps = []
            with plans, evictions:
                for _ in range(settings.plan_steps + 1):
                    plans.seconds = evictions.seconds = 0.0
                    step = _timed(lambda: _forward(patched, cache, 1))
                    steps.append((step, plans.seconds / step, evictions.seconds / step))
        # The first step meets what nobody has used yet.
        whole, plan, evict = (timing_of(values).median_s for values in zip(*steps[1:], strict=True))
        rows.append({"name": words, "keep": keep, "step_s": whole, "planning": plan, "eviction": evict})
    return rows


def statistics(settings: Settings) -> list[dict[str, Any]]:
    """A chunk in the middle of a long prompt: what an average one costs, with and without statistics of all queries."""
    model, shape = _layer(settings)
    before = settings.prompt // 2
    held = random_kv(shape, before)
    with ExitStack() as stack:
        competitors = []
        for words in _ASKING:
            keep = None if words == "full" else settings.prompt // settings.share
            patched, cache = stack.enter_context(_patched(model, words, keep))
            cache.session.expect(settings.prompt)
            cache.session.append(0, *held, torch.arange(before)[None])
            _told(cache)
            competitors.append(Competitor(words, _chunks(settings, patched, cache)))
        limits = Limits(seconds=0.0, least=max(2, settings.rounds), most=max(2, settings.rounds), warm_up=1)
        timings = contest(competitors, limits=limits, between=lambda: None)
    plain = timings["full"].median_s
    return [
        {"name": name, **asdict(timing), "over_plain": timing.median_s / plain - 1} for name, timing in timings.items()
    ]


class _Clock:
    """Adds up the time inside functions of a module or methods of a class, while it is entered."""

    def __init__(self, owner: Any, *names: str) -> None:
        self.seconds = 0.0
        self._owner, self._names = owner, names
        self._held: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for name in self._names:
            self._held[name] = vars(self._owner).get(name)
            setattr(self._owner, name, self._around(getattr(self._owner, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, own in self._held.items():
            if own is None:
                delattr(self._owner, name)
            else:
                setattr(self._owner, name, own)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


def _chunks(settings: Settings, model: Any, cache: Any) -> Callable[[int], Callable[[], object]]:
    """The same chunk in every turn: what the turn before added is forgotten first."""

    def prepare(turn: int) -> Callable[[], object]:
        if turn:
            cache.crop(-settings.chunk)
            cache.session.expect(settings.prompt - settings.prompt // 2)
        return lambda: _forward(model, cache, settings.chunk)

    return prepare


def _layer(settings: Settings) -> tuple[Any, Shape]:
    """One layer of Llama 3 8B's proportions, and the shape of its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, settings.prompt_hidden // 128)
    shape = Shape(dtype="float32", query_heads=heads, kv_heads=max(1, heads // 4))
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=settings.prompt_hidden,
        intermediate_size=settings.prompt_hidden * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * settings.prompt,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), shape


@contextmanager
def _patched(model: Any, words: str, keep: int | None) -> Iterator[tuple[Any, Any]]:
    """A patched twin with the same weights in memory, and its empty cache."""
    twin = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    with kvtier.patch(twin, words, keep=keep, store=StoreConfig()) as handle:
        yield twin, handle.new_cache()


def _told(cache: Any) -> None:
    """Tell the cache of the columns that its session was fed."""
    cache.state.history.extend(Columns(torch.arange(cache.session.length)[None]), None)


def _forward(model: Any, cache: Any, tokens: int) -> None:
    with torch.no_grad():
        model(input_ids=torch.randint(_VOCABULARY, (1, tokens)), past_key_values=cache, logits_to_keep=1)


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
