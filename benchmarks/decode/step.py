"""A whole decode step of a Llama of Llama-3-8B's layers: stock transformers beside kvtier.patch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvtier
from benchmarks.decode.clock import clock_of
from benchmarks.decode.settings import Settings, most_that_fit, refusal
from benchmarks.peers.streams import Streams
from benchmarks.peers.tiered import Traffic, TrafficMeter, treatment
from benchmarks.registry import BenchmarkError
from benchmarks.timing import Competitor, contest
from benchmarks.workload import KV, Shape, feed_generated, feed_prompt, random_kv
from kvtier.config import StoreConfig
from kvtier.core.session import Session
from kvtier.integrations.hf.columns import Columns
from kvtier.types import DTYPE_BYTES, DTypeName

if TYPE_CHECKING:
    from kvtier.integrations.hf.cache import KVTierCache

__all__ = ["measure"]

STOCK: Final = "transformers"
POLICIES: Final = ("full", "quest")
_VOCABULARY: Final = 1024
_HEADROOM: Final = 9 / 8
# Largest difference of logits that rounding explains, as a share of the largest logit.
_ROUNDING: Final[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 2.0**-5}


def measure(settings: Settings, streams: Streams, context: int, dtype: DTypeName) -> dict[str, Any]:
    """One case: rows of times, bytes and ratios.

    Raises
    ------
    BenchmarkError
        When the patched model with everything read gives other logits than the stock one.
    """
    shape = Shape(dtype=dtype, device=settings.device)

    def needed(layers: int) -> int:
        # Every runner holds the cache, kvtier's with headroom; beside them one layer is drawn, one copied to grow.
        copies = layers * (1 + len(POLICIES) * _HEADROOM) + 3
        return round(copies * context * shape.token_bytes + layers * _layer_weight_bytes(settings, shape))

    layers = most_that_fit(settings.model_layers, needed, settings.device)
    reason = refusal(needed(layers), settings.device)
    if reason is not None:
        return {"skipped": reason}
    with ExitStack() as stack, torch.no_grad():
        model = _model(settings, shape, layers)
        weights = sum(parameter.nbytes for parameter in [*model.model.layers.parameters(), *model.lm_head.parameters()])
        runners = {STOCK: _Runner(model, DynamicCache(config=model.config))}
        runners |= {f"kvtier: {name}": _patched(model, name, context, stack) for name in POLICIES}
        _fill(runners, layers, settings.generated, context, shape)
        difference = _check(runners, dtype)
        meters = {name: runner.meter() for name, runner in runners.items()}
        timings = contest(
            [runner.competitor(name) for name, runner in runners.items()],
            limits=settings.limits,
            between=streams.flush,
            clock=clock_of(settings.device),
        )
        traffic = {name: meters[name]() for name in runners}
    rows = []
    for name, timing in timings.items():
        nbytes = traffic[name].nbytes + weights
        rows.append(
            {
                "name": name,
                **asdict(timing),
                **asdict(traffic[name]),
                "gb_per_s": nbytes / timing.median_s / 1e9,
                "vs_stock": timings[STOCK].median_s / timing.median_s,
            }
        )
    return {"layers": layers, "weight_bytes": weights, "logit_difference": difference, "rows": rows}


class _Runner:
    """A model and its cache."""

    def __init__(self, model: LlamaForCausalLM, cache: Any) -> None:
        self.model = model
        self.cache = cache

    def feed(self, layer: int, prompt: KV, shape: Shape) -> None:
        """Put a prompt's keys and values into one layer."""
        self.cache.update(*prompt, layer)

    def finish(self, tails: Sequence[KV]) -> None:
        """Add the tokens that were generated since, of all layers."""
        for layer, tail in enumerate(tails):
            self.cache.update(*tail, layer)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, 1, vocabulary] after one token [1, 1]."""
        logits: torch.Tensor = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits
        return logits

    def meter(self) -> Callable[[], Traffic]:
        """Asked later: the bytes of keys and values that a step read."""
        return lambda: Traffic(kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers))

    def competitor(self, name: str) -> Competitor:
        """The step, to be timed."""

        def prepare(_: int) -> Callable[[], object]:
            ids = torch.randint(_VOCABULARY, (1, 1), device=self.model.device)
            return lambda: self.step(ids)

        return Competitor(name, prepare)


class _PatchedRunner(_Runner):
    """A patched model; what a prefill would have left is put into its session."""

    def __init__(self, model: LlamaForCausalLM, cache: KVTierCache) -> None:
        super().__init__(model, cache)
        if not isinstance(cache.session, Session):
            raise BenchmarkError(f"the patch must run on kvtier's own session, got {type(cache.session).__name__}")
        self.session = cache.session
        self._generated = 0

    def feed(self, layer: int, prompt: KV, shape: Shape) -> None:
        """Append a prompt's keys and values to one layer."""
        if layer == 0:
            self.session.expect(prompt.tokens)
        feed_prompt(self.session, layer, prompt, shape)

    def finish(self, tails: Sequence[KV]) -> None:
        """Append what was generated since, and tell the cache how many columns it was fed."""
        self._generated = tails[0].tokens
        feed_generated(self.session, tails)
        self.cache.state.history.extend(Columns(torch.arange(self.session.length)[None]), None)

    def meter(self) -> Callable[[], Traffic]:
        """From the session's own report."""
        return TrafficMeter(self.session, self.session.memory, generated=self._generated).per_step


@functools.lru_cache(maxsize=1)
def _model(settings: Settings, shape: Shape, layers: int) -> LlamaForCausalLM:
    """The stock model; made once for all contexts of a dtype that have room for so many layers."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * max(settings.contexts),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config)
    module: torch.nn.Module = model.eval()
    module.to(shape.device, shape.torch_dtype)
    return model


def _layer_weight_bytes(settings: Settings, shape: Shape) -> int:
    """Bytes of the projections of one layer."""
    heads = 2 * (shape.query_heads + shape.kv_heads) * shape.head_dim
    return settings.hidden * (heads + 3 * settings.intermediate) * DTYPE_BYTES[shape.dtype]


def _patched(model: LlamaForCausalLM, name: str, context: int, stack: ExitStack) -> _PatchedRunner:
    """A patched twin of the model: a configuration of its own, the same weights in memory."""
    twin = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    words, budgets = treatment(name, context)
    handle = stack.enter_context(kvtier.patch(twin, words, keep=budgets.keep, read=budgets.read, store=StoreConfig()))
    return _PatchedRunner(twin, handle.new_cache())


def _fill(runners: Mapping[str, _Runner], layers: int, generated: int, context: int, shape: Shape) -> None:
    """The same random keys and values for all: a prefill of 128K tokens would take longer than everything else."""
    tails = []
    for layer in range(layers):
        prompt, tail = random_kv(shape, context).split(generated)
        tails.append(tail)
        for runner in runners.values():
            runner.feed(layer, prompt, shape)
        del prompt
    for runner in runners.values():
        runner.finish(tails)


def _check(runners: Mapping[str, _Runner], dtype: DTypeName) -> float:
    """Largest difference of logits between stock and kvtier with everything read, as a share of the largest logit."""
    ids = torch.randint(_VOCABULARY, (1, 1), device=runners[STOCK].model.device)
    logits = {name: runner.step(ids).float() for name, runner in runners.items()}
    stock, ours = logits[STOCK], logits["kvtier: full"]
    difference = float((ours - stock).abs().max() / stock.abs().max())
    if not difference <= _ROUNDING[dtype]:
        raise BenchmarkError(
            f"logits under kvtier must be within {_ROUNDING[dtype]:.1e} of stock in {dtype}, "
            f"they differ by {difference:.1e} of the largest"
        )
    return difference
