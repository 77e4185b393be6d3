"""A fingerprint names what a model computes with: the same for equal models, another for the smallest difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import kvtier
from kvtier.errors import UnsupportedModelError
from kvtier.integrations.hf import fingerprint as module
from kvtier.integrations.hf.fingerprint import fingerprint
from kvtier.integrations.hf.tensor_digest import tensor_digests
from kvtier.testing.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_loading_and_patching_change_nothing(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    name = fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert len(bytes.fromhex(name)) == 32
    assert fingerprint(loaded) == name
    with kvtier.patch(loaded, "full"):
        assert fingerprint(loaded) == name
        loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
        assert fingerprint(loaded) == name
    assert fingerprint(tiny_model(family, seed=1)) != name


CHANGES: dict[str, Callable[[Any], Any]] = {
    "one_element": lambda model: model.model.layers[1].mlp.down_proj.weight[3, 5].add_(0.5),
    "one_bit": lambda model: model.model.layers[0].self_attn.q_proj.weight.view(torch.int32)[7, 9].bitwise_xor_(1),
    "a_buffer": lambda model: model.model.rotary_emb.inv_freq[0].mul_(1.0001),
    "another_tensor": lambda model: setattr(
        model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.clone() * 2)
    ),
    "all_of_a_tensor_past_its_version": lambda model: model.lm_head.weight.data.mul_(2),
    "rope_theta": lambda model: model.config.rope_parameters.update(rope_theta=20000.0),
    "window": lambda model: setattr(model.config, "sliding_window", 4),
    "norm": lambda model: setattr(model.config, "rms_norm_eps", 1e-5),
}


@pytest.mark.parametrize("full_bytes", [module.FULL_BYTES, 0], ids=["whole", "blocks"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_although_hashes_are_kept(
    change: str, full_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FULL_BYTES", full_bytes)
    model = tiny_model("mistral")
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        CHANGES[change](model)
    after = fingerprint(model)
    assert after != before
    fresh = tiny_model("mistral")
    with torch.no_grad():
        CHANGES[change](fresh)
    assert fingerprint(fresh) == after


def test_dtype_class_and_layers_make_other_names() -> None:
    models = [
        tiny_model("llama"),
        tiny_model("llama", dtype=torch.bfloat16),
        tiny_model("llama", num_hidden_layers=1),
        tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        tiny_model("llama").model,
        tiny_model("mistral"),
        tiny_model("mistral", sliding_window=None),
    ]
    assert len({fingerprint(model) for model in models}) == len(models)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for an old name
def test_adapters_count_as_far_as_they_act() -> None:
    model = tiny_model("llama")
    bare = fingerprint(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft = get_peft_model(model, config)
    first = fingerprint(peft)
    peft.add_adapter("second", config)
    peft.set_adapter("second")
    second = fingerprint(peft)
    with peft.disable_adapter():
        disabled = fingerprint(peft)
    peft.set_adapter("default")
    back = fingerprint(peft)
    peft.merge_adapter()
    merged = fingerprint(peft)

    assert len({bare, first, second, disabled, back, merged}) == 6
    peft.unmerge_adapter()
    peft.set_adapter("second")
    assert fingerprint(peft.get_base_model()) != back


def test_a_tokenizer_is_part_of_the_name_when_given(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tiny_model("llama")

    def tokenizer(words: dict[str, int]) -> Any:
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))  # noqa: S106
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)

    one, other = (fingerprint(model, tokenizer=tokenizer(words)) for words in ({"a": 0, "b": 1}, {"a": 1, "b": 0}))
    assert len({fingerprint(model), one, other}) == 3
    assert fingerprint(model, tokenizer=tokenizer({"a": 0, "b": 1})) == one


def test_weights_that_are_not_in_memory_have_no_name() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="no bytes in memory"):
        fingerprint(model)


@settings(deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (900, 700)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool]),
    whole=st.booleans(),
    data=st.data(),
)
def test_one_changed_element_changes_the_digest(
    shape: tuple[int, ...], dtype: torch.dtype, whole: bool, data: st.DataObject
) -> None:
    tensor = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape).to(dtype)
    index = data.draw(st.integers(0, tensor.numel() - 1))
    other = tensor.clone()
    other.view(-1)[index] = not other.view(-1)[index]
    changed = not torch.equal(other, tensor)

    names = [tensor_digests({"x": each}, whole=whole)["x"] for each in (tensor, tensor.clone(), other)]
    assert names[0] == names[1]
    assert (names[2] != names[0]) == changed
    if tensor.dim() == 2:
        strided = tensor.t().clone().t()
        assert tensor_digests({"x": strided}, whole=whole)["x"] == names[0]
