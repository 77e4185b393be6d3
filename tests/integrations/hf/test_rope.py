"""How models rotate: read from every family that is served, and refused where it is not known."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import kvtier
from kvtier.core.rotation import unrotated
from kvtier.errors import CompositionError
from kvtier.integrations.hf.layout import layout_of
from kvtier.testing.tiny_models import FAMILIES, VOCABULARY, tiny_model

POLICIES = ["streamingllm(positions='compact')", "expected_attention"]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_before_rotation_are_those_that_the_model_rotated(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model(family)
    layers = layout_of(model).layers
    home = sys.modules[type(model.get_decoder()).__module__]
    rotated: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = home.apply_rotary_pos_emb

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out: tuple[torch.Tensor, torch.Tensor] = original(query, key, *args, **kwargs)
        rotated.append((key, out[1]))
        return out

    monkeypatch.setattr(home, "apply_rotary_pos_emb", spy)
    with torch.no_grad():
        model(torch.arange(3, 60)[None])
    for layer, (before, after) in zip(layers, rotated, strict=True):
        assert layer.rope is not None
        torch.testing.assert_close(unrotated(layer.rope, after, torch.arange(57)), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "the frequencies of dynamic RoPE depend on the length of the text"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
                "factor": 2.0,
            },
            "the frequencies of longrope RoPE depend on the length of the text",
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_rotations_that_depend_on_the_length_are_refused(policy: str, overrides: dict[str, Any], message: str) -> None:
    model = tiny_model("llama", rope_parameters={"rope_theta": 10000.0, **overrides})
    with pytest.raises(CompositionError, match=message):
        kvtier.patch(model, policy, keep=16)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_family_whose_rotation_is_not_known_is_refused(policy: str) -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=VOCABULARY, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(CompositionError, match=r"how layer 0 rotates \(RoPE\) is not known"):
        kvtier.patch(model, policy, keep=16)
