"""The KV layout of a transformers model: read from its configuration, refused where paging would be wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from kvtier.errors import UnsupportedModelError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.rope import rope_of
from kvtier.types import DTYPE_BYTES, DTypeName, KVLayout, LayerLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["layer_devices", "layout_of"]


def layout_of(model: Any, *, page_tokens: int = 16, block_tokens: int = 64, chunk_tokens: int = 256) -> KVLayout:
    """The layout of a decoder: heads, head dimensions, dtype and sliding window of every layer.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A decoder, or a model with one inside.

    Raises
    ------
    UnsupportedModelError
        With the reason, for a model whose cache is not one K and one V per layer, token and KV head under causal
        attention: latent attention (MLA), encoder-decoders, recurrent or hybrid layers, chunked or bidirectional
        attention, layers that share keys and values, and families outside transformers' attention interface.
    """
    inner = compat.unwrap(model)
    config = compat.text_config(inner)
    _refuse_configuration(inner, config)
    layers = compat.cached_layers(config)
    _refuse_layers(inner, config, layers)
    dtype = _dtype_name(inner)
    return KVLayout(
        layers=tuple(
            replace(_layer(config, index, layer.window, dtype), rope=rope_of(inner, config, index))
            for index, layer in enumerate(layers)
        ),
        page_tokens=page_tokens,
        block_tokens=block_tokens,
        chunk_tokens=chunk_tokens,
    )


def layer_devices(model: Any) -> tuple[torch.device, ...]:
    """The device that each layer's attention runs on, in order of the layers."""
    return tuple(compat.module_device(module) for module in compat.attention_modules(compat.unwrap(model)))


def _refuse_configuration(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; kvtier serves decoder-only models")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} caches latents (multi-head latent attention, kv_lora_rank={config.kv_lora_rank}), "
            "not K and V per head"
        )
    if getattr(config, "num_kv_shared_layers", None) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModelError(f"{name} has layers that read the keys and values of other layers")
    if getattr(config, "attention_chunk_size", None) or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise UnsupportedModelError(
            f"{name} has chunked attention, where a token does not see the chunk before its own"
        )
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} has bidirectional attention; kvtier serves causal models")
    if not getattr(config, "num_attention_heads", None):
        raise UnsupportedModelError(f"{name} has no attention heads, so there are no keys and values to keep")


def _refuse_layers(model: PreTrainedModel, config: PreTrainedConfig, layers: list[compat.CachedLayer]) -> None:
    name = type(model).__name__
    odd = sorted({layer.kind for layer in layers if not layer.plain})
    if odd:
        raise UnsupportedModelError(
            f"{name} has layers that transformers caches as {', '.join(odd)}, not as plain K and V"
        )
    if not compat.takes_attention_functions(model):
        raise UnsupportedModelError(f"{name} does not call its attention through transformers' AttentionInterface")
    modules = compat.attention_modules(model)
    indices = [module.layer_idx for module in modules]
    if indices != list(range(config.num_hidden_layers)) or len(layers) != len(indices):
        raise UnsupportedModelError(
            f"{name} must have one attention module for each of its {config.num_hidden_layers} layers, "
            f"got layers {indices}"
        )
    if any(getattr(module, "is_causal", True) is False for module in modules):
        raise UnsupportedModelError(f"{name} has bidirectional attention; kvtier serves causal models")


def _layer(config: PreTrainedConfig, index: int, window: int | None, dtype: DTypeName) -> LayerLayout:
    own = _of_layer(config, index)
    heads = own.num_attention_heads
    key_dim = getattr(own, "head_dim", None) or own.hidden_size // heads
    return LayerLayout(
        num_query_heads=heads,
        num_kv_heads=getattr(own, "num_key_value_heads", None) or heads,
        key_dim=key_dim,
        value_dim=getattr(own, "v_head_dim", None) or key_dim,
        dtype=dtype,
        window=window,
    )


def _of_layer(config: PreTrainedConfig, index: int) -> Any:
    """The configuration of one layer, for families whose layers differ."""
    per_layer = getattr(config, "per_layer_config", None)
    return config if per_layer is None else per_layer[index]


def _dtype_name(model: PreTrainedModel) -> DTypeName:
    name = str(model.dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(
            f"keys and values must be {', '.join(DTYPE_BYTES)}, and the weights of {type(model).__name__} are {name}"
        )
    return cast("DTypeName", name)
