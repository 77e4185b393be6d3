"""Layouts read from models, and the reasons for models that have none."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import UnsupportedModelError
from kvtier.integrations.hf.layout import layer_devices, layout_of
from kvtier.testing.tiny_models import FAMILIES, WINDOW, tiny_model
from kvtier.types import KVLayout, LayerLayout

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {
    "mistral": [WINDOW, WINDOW],
    "gemma2": [WINDOW, None],
    "gemma3": [WINDOW, None],
    "gpt_oss": [WINDOW, None],
    "qwen2_moe": [None, WINDOW],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_windows(family: str) -> None:
    layout = layout_of(tiny_model(family))
    windows = WINDOWS.get(family, [None, None])
    assert layout.layers == tuple(
        LayerLayout(num_query_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, dtype="float32", window=window)
        for window in windows
    )


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]),
    dim=st.sampled_from([None, 8, 24]),
    layers=st.integers(1, 3),
    window=st.none() | st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_the_layout_is_what_the_configuration_says(
    heads: tuple[int, int], dim: int | None, layers: int, window: int | None, dtype: torch.dtype
) -> None:
    config = transformers.MistralConfig(
        **{**TINY, "hidden_size": 96, "num_hidden_layers": layers, "num_attention_heads": heads[0]},
        head_dim=dim,
        sliding_window=window,
    )
    config.num_key_value_heads = heads[1]
    layout = layout_of(transformers.MistralForCausalLM(config).to(dtype), page_tokens=4, block_tokens=8)
    layer = LayerLayout(
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        key_dim=dim or 96 // heads[0],
        value_dim=dim or 96 // heads[0],
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]  # a name of the four
        window=window,
    )
    assert layout == KVLayout(layers=(layer,) * layers, page_tokens=4, block_tokens=8, chunk_tokens=256)


def build(config: str, model: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**{**TINY, **changes}))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(
            build(
                "DeepseekV3Config",
                "DeepseekV3ForCausalLM",
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
            ),
            r"latents \(multi-head latent attention, kv_lora_rank=16\)",
            id="deepseek_v3",
        ),
        pytest.param(
            build("T5Config", "T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4),
            "encoder-decoder",
            id="t5",
        ),
        pytest.param(build("BertConfig", "BertModel"), "bidirectional", id="bert"),
        pytest.param(build("MambaConfig", "MambaForCausalLM", state_size=4), "Linear|attention heads", id="mamba"),
        pytest.param(build("JambaConfig", "JambaForCausalLM", use_mamba_kernels=False), "Linear", id="jamba_hybrid"),
        pytest.param(
            build("Llama4TextConfig", "Llama4ForCausalLM", attention_chunk_size=8, num_local_experts=2, head_dim=16),
            "chunked attention",
            id="llama4_chunked",
        ),
        pytest.param(
            build("LlamaConfig", "LlamaForCausalLM", num_kv_shared_layers=1),
            "keys and values of other layers",
            id="kv_sharing",
        ),
        pytest.param(build("BloomConfig", "BloomForCausalLM"), "AttentionInterface", id="bloom"),
        pytest.param(
            build("Gemma3TextConfig", "Gemma3ForCausalLM", use_bidirectional_attention=True, head_dim=16),
            "bidirectional",
            id="gemma3_bidirectional",
        ),
        pytest.param(lambda: tiny_model("llama", dtype=torch.float8_e4m3fn), "float64, float32.*float8", id="float8"),
    ],
)
def test_models_that_are_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        layout_of(make())


@pytest.mark.parametrize("model", ["gpt2", torch.nn.Linear(2, 2), None], ids=["text", "module", "none"])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="takes a transformers PreTrainedModel"):
        layout_of(model)


def test_a_layout_survives_saving_the_configuration(tmp_path: Any) -> None:
    model = tiny_model("gemma3")
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3_text"
    loaded = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig.from_pretrained(tmp_path))
    assert layout_of(loaded) == layout_of(model)


def test_devices_follow_the_layers() -> None:
    model = tiny_model("llama")
    assert layer_devices(model) == (torch.device("cpu"),) * 2
    # Weights that accelerate keeps elsewhere say where they compute.
    model.model.layers[1].self_attn._hf_hook = type("Hook", (), {"execution_device": "meta"})()
    assert layer_devices(model) == (torch.device("cpu"), torch.device("meta"))
