"""The attention and mask functions that transformers calls under the name "kvtier"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvtier.errors import InputError, MaskError, SessionStateError, UnsupportedModelError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.columns import read_columns
from kvtier.integrations.hf.stage import Staged, stage
from kvtier.integrations.hf.stateless import attend_stateless
from kvtier.types import LayerLayout

__all__ = ["Softmax", "adopt", "attention", "mask", "release"]

# Arguments of attention functions that change what attention means; a family that uses one is not served.
_FOREIGN = ("position_bias", "head_mask", "block_table", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "indices")

_adopted: WeakKeyDictionary[nn.Module, LayerLayout] = WeakKeyDictionary()


class Softmax(NamedTuple):
    """What shapes the softmax of a layer: logit scale, window in tokens, soft cap of logits, sink logits [Hq]."""

    scale: float
    window: int | None
    softcap: float | None
    sink: torch.Tensor | None


def adopt(modules: list[nn.Module], layers: tuple[LayerLayout, ...]) -> None:
    """Let these attention modules attend through kvtier."""
    _adopted.update(zip(modules, layers, strict=True))


def release(modules: list[nn.Module]) -> None:
    """Undo ``adopt``."""
    for module in modules:
        _adopted.pop(module, None)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend through the session of the cache that the layer just updated; without a cache, to the given keys alone.

    Parameters
    ----------
    query : Tensor
        [B, Hq, Tq, Dk].
    key, value : Tensor
        [B, Hk, Tq, D], exactly what ``Cache.update`` returned.
    attention_mask : Tensor, optional
        Padding [B, T] bool over all columns, as ``mask`` returns it.

    Returns
    -------
    out : Tensor
        [B, Tq, Hq, Dv], contiguous.
    weights : None
        Paged attention has no matrix of weights.

    Raises
    ------
    MaskError, InputError, SessionStateError, UnsupportedModelError
        For what paging cannot honour; see the message.
    """
    staged = stage.take()
    layout = _adopted.get(module)
    if layout is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for kvtier's attention, but its model is not patched: it shares its config "
            "with a patched model or is a copy of one; build it from a config of its own"
        )
    _refuse(module, dropout, kwargs)
    window = _window(layout, sliding_window)
    softmax = Softmax(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap, s_aux)
    with torch.inference_mode(False), torch.no_grad():
        if staged is None:
            out = _attend_given(query, key, value, attention_mask, position_ids, softmax)
        else:
            _check_staged(module, staged, key, value)
            out = _attend_session(staged, query, attention_mask, position_ids, softmax)
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out.transpose(1, 2).contiguous(), None


def mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding mask [B, T] bool, or None when every column is a token; causality and windows follow from positions.

    Raises
    ------
    MaskError
        For any other pattern: bidirectional, packed, block-wise, chunked or custom.
    """
    if use_vmap or not allow_is_causal_skip or not compat.is_causal_pattern(mask_function):
        raise MaskError(
            "kvtier serves causal and sliding-window masks with padding, "
            f"got {getattr(mask_function, '__qualname__', 'another')}; "
            "leave out custom, packed, block-wise and bidirectional masks"
        )
    if attention_mask is None:
        return None
    # Without a cache transformers takes the length of the keys from the mask itself.
    columns = max(q_length, kv_length)
    if attention_mask.shape[-1] != columns:
        raise MaskError(
            f"the attention mask must cover all {columns} columns (cached and new), got {attention_mask.shape[-1]}; "
            "pass the mask of the cached columns too"
        )
    return None if bool(attention_mask.all()) else attention_mask


def _attend_session(
    staged: Staged,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    softmax: Softmax,
) -> torch.Tensor:
    """Append the staged pair and attend to all that its session holds -> [B, Hq, Tq, Dv]."""
    state, layer = staged.state, staged.layer
    state.check_shapes(layer, staged.key, staged.value)
    key, value = staged.key.detach(), staged.value.detach()
    drafted = state.attend_drafts(layer, key, value, query, softmax._asdict())
    if drafted is not None:
        return drafted
    batch, width = query.shape[0], query.shape[2]
    columns = state.begin(layer, attention_mask, position_ids, batch, width)
    positions = columns.positions_on(query.device)
    state.session.append(layer, key, value, positions, spans=columns.spans)
    state.appended(layer, query)
    out = state.session.attend(layer, query, positions, spans=columns.spans, **softmax._asdict())
    state.finish(layer)
    return out


def _attend_given(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    softmax: Softmax,
) -> torch.Tensor:
    """Attend to the keys of this forward -> [B, Hq, Tq, Dv]."""
    batch, width = query.shape[0], query.shape[2]
    if key.shape[2] != width:
        raise UnsupportedModelError(
            f"without a kvtier cache a forward attends to its own {width} tokens, got {key.shape[2]} keys; "
            "pass past_key_values=handle.new_cache()"
        )
    columns = read_columns(attention_mask, position_ids, batch=batch, start=0, width=width)
    return attend_stateless(query, key, value, columns, **softmax._asdict())


def _check_staged(module: nn.Module, staged: Staged, key: torch.Tensor, value: torch.Tensor) -> None:
    if staged.layer != module.layer_idx or key is not staged.key or value is not staged.value:
        raise UnsupportedModelError(
            f"{type(module).__name__} changes its keys or values after it caches them; kvtier serves families that "
            "attend to what they cached"
        )


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if module.training or dropout:
        raise SessionStateError("kvtier serves inference, and this model is in training mode; call model.eval()")
    if kwargs.get("output_attentions"):
        raise InputError("paged attention has no attention weights; leave out output_attentions=True")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for bidirectional attention; kvtier serves causal models"
        )
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {foreign[0]} to its attention; kvtier does not serve that"
        )


def _window(layout: LayerLayout, given: int | None) -> int | None:
    if given is not None and given != layout.window:
        raise UnsupportedModelError(
            f"a layer asks for a window of {given} tokens where the configuration says {layout.window}; "
            "change the configuration before patching, not after"
        )
    return layout.window


class _NoGradient(torch.autograd.Function):
    """Passes a result on in grad mode, and refuses to differentiate it."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise SessionStateError("kvtier's attention has no gradient; remove the patch to train")
