"""Random models of real families, small enough to run hundreds of times on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "VOCABULARY", "WINDOW", "left_padded", "tiny_model"]

VOCABULARY = 97
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}

# Family: (configuration class, model class, what differs). Sliding windows are shorter than the tests' prompts.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": _YARN,
            "attn_implementation": "eager",
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
}


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of a family in eval mode, with 2 layers, 4 query heads, 2 KV heads of 16 and no end token.

    Parameters
    ----------
    family : str
        A key of ``FAMILIES``.
    overrides : Any
        Fields of the configuration to change.
    """
    import transformers

    config_name, model_name, changes = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**_COMMON, **changes, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = getattr(transformers, model_name)(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in name:
                # The default of 0.02 would leave attention almost uniform, and any mistake in it invisible.
                torch.nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.2)
    ready: PreTrainedModel = model.to(dtype).eval()
    return ready


def left_padded(lengths: Sequence[int], *, seed: int = 0, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left: ``input_ids`` and ``attention_mask`` [B, T] int64."""
    draw = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    ids = torch.randint(3, vocabulary, (len(lengths), columns), generator=draw)
    mask = torch.stack([(torch.arange(columns) >= columns - length).long() for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}
