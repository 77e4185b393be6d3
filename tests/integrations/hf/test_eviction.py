"""Policies that evict while a model decodes, or merge, under transformers: with room for all they change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvtier
from kvtier.core.compose import bind
from kvtier.core.compose import policy as policy_named
from kvtier.core.kept import KeptSequence
from kvtier.core.ragged import RaggedSequence
from kvtier.integrations.hf.layout import layout_of
from kvtier.integrations.hf.patch import attach
from kvtier.testing.plain_policies import PlainPolicySession
from kvtier.testing.tiny_models import left_padded, tiny_model
from kvtier.types import Budgets, KVLayout

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
POLICIES = [
    "streamingllm",
    "streamingllm(positions='compact')",
    "h2o(recent=4)",
    "tova",
    "pyramidkv(window=4)",
    "expected_attention",
    "d2o(sinks=1, recent=4)",
    "d2o(sinks=1, recent=4, when='step')",
    "adakv(window=4)",
]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 9}], ids=str)
def test_with_room_for_all_tokens_are_those_of_the_model(family: str, policy: str, options: dict[str, Any]) -> None:
    model = tiny_model(family)
    right = model.generate(**left_padded((31, 20)), **GREEDY, **options)
    with kvtier.patch(model, policy, keep=1000):
        assert torch.equal(model.generate(**left_padded((31, 20)), **GREEDY, **options), right)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_in_a_batch_are_what_they_are_alone(policy: str) -> None:
    model = tiny_model("llama")
    inputs = left_padded((60, 37))
    with kvtier.patch(model, policy, keep=16):
        together = model.generate(**inputs, **GREEDY)
        for row, length in enumerate((60, 37)):
            ids = inputs["input_ids"][row : row + 1, -length:]
            alone = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            assert torch.equal(alone[0, -12:], together[row, -12:])


class PlainMemory:
    """Sessions that carry out a policy's plans over plain tensors."""

    def __init__(self, layout: KVLayout, text: str, keep: int) -> None:
        self.layout = layout
        self.bound = bind(policy_named(text), layout, Budgets(keep=keep))

    def session(self) -> PlainPolicySession:
        return PlainHere(self.layout, self.bound)

    def max_prefill_chunk(self, rows: int) -> int | None:
        return None

    def close(self) -> None:
        pass


class PlainHere(PlainPolicySession):
    def record_past(self, recording: bool) -> None:
        pass

    def report(self) -> Any:
        return None


@pytest.mark.parametrize(
    "text",
    [
        "streamingllm(positions='compact')",
        "streamingllm(sinks=0, positions='compact')",
        "expected_attention(n_future=20)",
        "d2o(sinks=1, recent=4, when='step')",
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_says_what_it_says_over_plain_tensors(text: str, family: str) -> None:
    model = tiny_model(family)
    inputs = left_padded((50,))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    with attach(model, PlainMemory(layout_of(model), text, 16)):
        right = model.generate(**inputs, **options)
    with kvtier.patch(model, text, keep=16):
        assert torch.equal(model.generate(**inputs, **options), right)


def test_a_text_longer_than_the_positions_of_the_model_goes_on() -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    with kvtier.patch(model, "streamingllm(positions='compact')", keep=16) as handle:
        cache = handle.new_cache()
        out = model.generate(**left_padded((40,)), do_sample=False, max_new_tokens=120, past_key_values=cache)
        assert out.shape == (1, 160)
        held = cache.session._batch.sequences  # type: ignore[attr-defined]
        assert all(list(sequence.segments())[-1].ahead == 159 - 16 for sequence in held)
        with torch.no_grad():
            logits = model(out[:, -1:], past_key_values=cache, cache_position=torch.tensor([159])).logits
        assert bool(logits.isfinite().all())


@pytest.mark.parametrize("policy", ["h2o(recent=4)", "tova", "streamingllm", "streamingllm(positions='compact')"])
def test_budgets_hold_while_it_decodes(policy: str) -> None:
    model = tiny_model("llama")
    with kvtier.patch(model, policy, keep=16) as handle:
        cache = handle.new_cache()
        model.generate(**left_padded((60,)), **GREEDY, past_key_values=cache)
        held = cache.session._batch.sequences  # type: ignore[attr-defined]
        assert held
        assert all(isinstance(sequence, KeptSequence) and sequence.length == 16 for sequence in held)
        assert handle.report().to_dict()["kept"] == 16


@pytest.mark.parametrize("policy", ["adakv(window=4)", "adapyramidkv(window=4, beta=4)"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 9}], ids=str)
def test_heads_of_a_layer_share_its_budget(policy: str, options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with kvtier.patch(model, policy, keep=16) as handle:
        cache = handle.new_cache()
        model.generate(**left_padded((60,)), **GREEDY, **options, past_key_values=cache)
        held = cache.session._batch.sequences  # type: ignore[attr-defined]
        assert held
        assert all(isinstance(sequence, RaggedSequence) for sequence in held)
        layers = [sum(int(sequence.counts.sum()) for sequence in rows) for rows in (held[::2], held[1::2])]
        rows = options.get("num_beams", 1)
        assert sum(layers) == rows * 2 * 2 * (16 + 11)
        assert any(sequence.counts.min() < sequence.counts.max() for sequence in held)


@pytest.mark.parametrize(
    ("policy", "asks"),
    [("h2o(recent=4)", "the attention"), ("expected_attention", "the query")],
    ids=["h2o", "expected"],
)
def test_a_policy_that_asks_about_every_token_runs_every_token(policy: str, asks: str) -> None:
    model = tiny_model("llama")
    tiers = {"tiers": [{"name": "host", "backend": "host", "capacity": "64MiB"}], "page_tokens": 4, "block_tokens": 8}
    inputs = left_padded((100,))
    with kvtier.open_store({**tiers, "chunk_tokens": 16}) as store:
        outputs = []
        for _ in range(2):
            with kvtier.patch(model, policy, keep=32, store=store) as handle:
                outputs.append(model.generate(**inputs, **GREEDY))
                store.flush()
                prefix = handle.report().prefix  # type: ignore[attr-defined]
        assert torch.equal(*outputs)
        assert prefix.tokens_saved == 0
        assert prefix.tokens_matched > 0
        assert f"asks about {asks} of every token" in prefix.reason
