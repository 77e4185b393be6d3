"""What a patched model refuses, before it runs or instead of running wrongly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from kvtier.errors import InputError, MissingDependencyError, SessionStateError, UnsupportedModelError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.patch import PatchHandle
from kvtier.testing.tiny_models import left_padded, tiny_model

Attach = Callable[..., PatchHandle]

VERSION = "kvtier.integrations.hf.compat.transformers.__version__"
PROMPT = left_padded([12])
ONE = left_padded([1])["input_ids"]


@pytest.mark.parametrize(
    ("make", "got"),
    [
        pytest.param(lambda model: DynamicCache(config=model.config), "DynamicCache", id="dynamic_cache"),
        pytest.param(lambda model: ((ONE, ONE),), "tuple", id="tuple"),
    ],
)
def test_caches_of_others(attached: Attach, make: Callable[[Any], Any], got: str) -> None:
    model = tiny_model("llama")
    with attached(model):
        for call in (model.generate, model):
            with pytest.raises(UnsupportedModelError, match=rf"handle\.new_cache\(\), or none, got {got}"):
                call(**PROMPT, past_key_values=make(model))


def test_a_cache_of_another_handle(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model), attached(tiny_model("llama")) as other:
        for call in (model.generate, model):
            with pytest.raises(UnsupportedModelError, match="another handle"):
                call(**PROMPT, past_key_values=other.new_cache())


@pytest.mark.parametrize("layers", [1, 2])
def test_our_cache_under_an_unpatched_model(attached: Attach, layers: int) -> None:
    patched, stranger = tiny_model("llama", num_hidden_layers=layers), tiny_model("llama", num_hidden_layers=layers)
    with attached(patched) as handle:
        cache = handle.new_cache()
        with pytest.raises(UnsupportedModelError, match="did not attend through kvtier"):
            stranger.generate(**PROMPT, past_key_values=cache, max_new_tokens=2)
        patched.generate(**PROMPT, past_key_values=handle.new_cache(), max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param(
            {"cache_implementation": "static"}, UnsupportedModelError, "leave it out", id="cache_implementation"
        ),
        pytest.param(
            {"generation_config": GenerationConfig(cache_implementation="quantized")},
            UnsupportedModelError,
            "cache_implementation='quantized'",
            id="cache_implementation_in_config",
        ),
        pytest.param({"output_attentions": True}, InputError, "no attention weights", id="output_attentions"),
        pytest.param({"assistant_early_exit": 1}, UnsupportedModelError, "half of the layers", id="early_exit"),
    ],
)
def test_options_of_generate(attached: Attach, options: Any, error: type[Exception], message: str) -> None:
    model = tiny_model("llama")
    with attached(model), pytest.raises(error, match=message):
        model.generate(**PROMPT, **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        pytest.param({"input_ids": ONE[:, :0]}, "at least one token", id="no_columns"),
        pytest.param({"input_ids": ONE[:0]}, "at least one token", id="no_rows"),
        pytest.param(
            {"input_ids": ONE.expand(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            "mask of row 1 has none",
            id="row_of_padding",
        ),
        pytest.param(left_padded([257]), "256 positions, got a prompt of 257", id="too_long"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_prompts(attached: Attach, prompt: Any, message: str, use_cache: bool) -> None:
    model = tiny_model("llama")
    with attached(model), pytest.raises(InputError, match=message):
        model.generate(**prompt, use_cache=use_cache)


def test_a_prompt_as_long_as_the_positions_runs(attached: Attach) -> None:
    model = tiny_model("llama", max_position_embeddings=32)
    prompt = left_padded([32, 40])
    prompt["attention_mask"][1, :10] = 0
    with attached(model):
        assert model.generate(**left_padded([32]), max_new_tokens=1).shape == (1, 33)
        # Longer in columns, but not in tokens.
        assert model.generate(**prompt, max_new_tokens=1).shape == (2, 41)


def test_a_prompt_that_adds_nothing_to_its_cache(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = handle.new_cache()
        model(**PROMPT, past_key_values=cache)
        with pytest.raises(InputError, match="append at least one new token"):
            model.generate(**PROMPT, past_key_values=cache)


def test_a_model_in_training_mode(attached: Attach) -> None:
    model = tiny_model("llama").train()
    with attached(model):
        with pytest.raises(SessionStateError, match=r"model\.eval\(\)"):
            model(**PROMPT)
        with pytest.raises(SessionStateError, match=r"model\.eval\(\)"):
            model.generate(**PROMPT, max_new_tokens=1)


def test_dropout(attached: Attach) -> None:
    model = tiny_model("llama", attention_dropout=0.1)
    with attached(model):
        model(**PROMPT)
        model.model.layers[0].self_attn.train()
        with pytest.raises(SessionStateError, match="inference"):
            model(**PROMPT)


def test_gradients(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model):
        logits = model(**PROMPT).logits
        with pytest.raises(SessionStateError, match="no gradient"):
            logits.sum().backward()
        with torch.no_grad():
            assert not model(**PROMPT).logits.requires_grad


def test_attention_weights_in_forward(attached: Attach) -> None:
    model = tiny_model("llama", attn_implementation="eager")
    with attached(model), pytest.raises(InputError, match="no attention weights"):
        model(**PROMPT, output_attentions=True)


def test_autocast(attached: Attach) -> None:
    model = tiny_model("llama")
    with (
        attached(model),
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(UnsupportedModelError, match="without autocast"),
    ):
        model(**PROMPT)


def test_a_window_that_changed_after_patching(attached: Attach) -> None:
    model = tiny_model("mistral")
    with attached(model):
        model.config.sliding_window = 5
        with pytest.raises(UnsupportedModelError, match="window of 5 tokens where the configuration says 8"):
            model(**PROMPT)


def test_keys_that_change_after_they_are_cached(attached: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = handle.new_cache()
        update = cache.update
        monkeypatch.setattr(cache, "update", lambda *args: tuple(2 * x for x in update(*args)))
        with pytest.raises(UnsupportedModelError, match="changes its keys"):
            model(**PROMPT, past_key_values=cache)


def test_a_foreign_argument_of_the_attention(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model), pytest.raises(UnsupportedModelError, match="passes cu_seq_lens_q"):
        model(**PROMPT, cu_seq_lens_q=torch.tensor([0, 12]))


def test_another_batch_on_a_used_cache(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = handle.new_cache()
        model(**PROMPT, past_key_values=cache)
        with pytest.raises(InputError, match="holds 1 rows, got a batch of 2"):
            model(ONE.expand(2, 1), past_key_values=cache)
        model(ONE, past_key_values=cache)


def test_the_inner_model_with_a_cache_of_transformers(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model):
        cache = model.model(PROMPT["input_ids"]).past_key_values
        with pytest.raises(UnsupportedModelError, match=r"past_key_values=handle\.new_cache\(\)"):
            model.model(ONE, past_key_values=cache)


@pytest.mark.parametrize(
    ("version", "refused"), [("5.15.2", True), ("5.16.0", False), ("5.23.1", False)], ids=["older", "oldest", "newest"]
)
def test_versions_of_transformers(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    monkeypatch.setattr(VERSION, version)
    if refused:
        with pytest.raises(MissingDependencyError, match=r"5\.16 to 5\.23, got 5\.15\.2"):
            compat.check_version()
    else:
        compat.check_version()


def test_a_version_never_tried_is_noted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(VERSION, "5.99.0.dev0")
    compat.check_version()
    assert "newer than what kvtier was tested with" in caplog.text
