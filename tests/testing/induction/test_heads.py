"""What the heads of the induction model look at, and that RMSNorm gives the stream back as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtier.testing.induction import InductionSpec, build_model, plant_needles, read_default_document
from kvtier.testing.induction.heads import Residual

SPEC = InductionSpec()
PLACES = [(layer, head) for layer in range(SPEC.num_layers) for head in range(SPEC.num_kv_heads)]


@pytest.fixture(scope="module")
def seen(scene: Any) -> dict[str, Any]:
    """Attention weights [Hq, T, T] and streams [T, hidden] of every layer over one prompt."""
    document = plant_needles(read_default_document(900), count=1, context=900, values=3)
    ids = scene.tokenizer(document.prompt(document.needles[0]), return_tensors="pt").input_ids
    model = build_model(scene.tokenizer)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = model(ids, output_attentions=True, output_hidden_states=True)
    tokens = scene.tokenizer.convert_ids_to_tokens(ids[0])
    return {
        "tokens": tokens,
        "needle": tokens.index(document.needles[0].key),
        "attention": [layer[0] for layer in output.attentions],
        "streams": [layer[0] for layer in output.hidden_states],
    }


def query_heads(kv_head: int) -> slice:
    """The query heads that share a KV head."""
    group = SPEC.num_query_heads // SPEC.num_kv_heads
    return slice(kv_head * group, (kv_head + 1) * group)


def test_previous_head_looks_one_token_back(seen: dict[str, Any]) -> None:
    weights = seen["attention"][0][query_heads(0)]
    back = weights.diagonal(offset=-1, dim1=1, dim2=2)

    assert back.min() > 0.9999


def test_match_head_looks_behind_what_was_asked(seen: dict[str, Any]) -> None:
    weights = seen["attention"][SPEC.match_layer][query_heads(SPEC.num_kv_heads - 1), -1]

    assert weights[:, seen["needle"] + 1].min() > 0.9999


def test_sink_heads_look_at_the_first_token(seen: dict[str, Any]) -> None:
    for layer, head in PLACES:
        if SPEC.role(layer, head) == "sink":
            assert seen["attention"][layer][query_heads(head), 1:, 0].min() > 0.98


def test_local_heads_look_at_what_is_near(seen: dict[str, Any]) -> None:
    for layer, head in PLACES:
        if SPEC.role(layer, head) == "local":
            assert seen["attention"][layer][query_heads(head), -1, -64:].sum(-1).min() > 0.9


def test_idle_heads_write_nothing(scene: Any) -> None:
    idle = 0
    for layer, head in PLACES:
        written = scene.model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (SPEC.num_query_heads, -1))
        silent = bool((written[:, query_heads(head)] == 0).all())
        assert silent == (SPEC.role(layer, head) not in ("previous", "match"))
        idle += silent
    assert idle == SPEC.num_layers * SPEC.num_kv_heads - 2


def test_norms_give_the_stream_back(seen: dict[str, Any], scene: Any) -> None:
    for layer in range(SPEC.num_layers):
        stream = seen["streams"][layer][2:]
        normed = scene.model.model.layers[layer].input_layernorm(stream)
        # The output part of a word seen before in several places is a mean of codes, shorter than one.
        tolerance = 1e-5 if layer <= SPEC.match_layer else 0.12
        torch.testing.assert_close(normed, stream, rtol=tolerance, atol=1e-6)


def test_stream_holds_the_code_of_the_token_before(seen: dict[str, Any]) -> None:
    at = Residual(SPEC)
    before, after = seen["streams"][0], seen["streams"][1]

    torch.testing.assert_close(after[1:, at.previous], before[:-1, at.code], rtol=0, atol=1e-4)


def test_logits_are_sure_of_the_answer(scene: Any) -> None:
    needle = scene.document.needles[0]
    ids = scene.tokenizer(scene.document.prompt(needle), return_tensors="pt").input_ids
    with torch.inference_mode():
        chances = scene.model(ids, logits_to_keep=1).logits[0, -1].softmax(dim=-1)

    assert chances[scene.tokenizer.convert_tokens_to_ids(needle.values[0])] > 0.9
