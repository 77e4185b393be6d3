"""How the layers of a transformers model rotate their queries and keys, read from the model and tried on numbers."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from kvtier.core.rotation import unrotated
from kvtier.types import Rope

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["rope_of"]

# Families whose every layer rotates queries and keys just before they are cached, as their code says.
_FAMILIES: Final = frozenset(
    {
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
    }
)
_VARYING: Final = frozenset({"dynamic", "longrope"})
_PLACES: Final = (0, 1, 77, 1234)
_TOLERANCE: Final = 1e-3


def rope_of(model: PreTrainedModel, config: PreTrainedConfig, index: int) -> Rope | None:
    """How layer ``index`` rotates; None when that is not known for sure.

    The model's own functions rotate a few vectors, and what kvtier takes to be their inverse must undo that.
    """
    if config.model_type not in _FAMILIES:
        return None
    try:
        return _read(model, config, index)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        # Another release may name or call its parts otherwise; a policy that asks is then refused, no other is.
        return None


def _read(model: PreTrainedModel, config: PreTrainedConfig, index: int) -> Rope | None:
    rotary: Any = model.get_decoder().rotary_emb
    own = isinstance(rotary.rope_type, dict)
    kind = config.layer_types[index] if own else ""
    name = rotary.rope_type[kind] if own else rotary.rope_type
    prefix = f"{kind}_" if own else ""
    frequencies = getattr(rotary, f"{prefix}inv_freq")
    if frequencies.is_meta:
        return None
    rope = Rope(
        frequencies=tuple(frequencies.tolist()),
        scaling=float(getattr(rotary, f"{prefix}attention_scaling")),
        changes=f"the frequencies of {name} RoPE depend on the length of the text" if name in _VARYING else "",
    )
    return rope if rope.changes or _undone(model, rotary, rope, [kind] if own else []) else None


def _undone(model: PreTrainedModel, rotary: nn.Module, rope: Rope, kind: list[str]) -> bool:
    """Whether ``unrotated`` takes back what the model does to vectors at some positions."""
    rotate = sys.modules[type(model.get_decoder()).__module__].apply_rotary_pos_emb
    dim = 2 * len(rope.frequencies)
    device = next(rotary.buffers()).device
    vectors = torch.linspace(-math.pi, math.e, len(_PLACES) * dim, device=device).view(1, 1, len(_PLACES), dim)
    places = torch.tensor([_PLACES], device=device)
    with torch.no_grad():
        turned = rotate(vectors, vectors, *rotary(vectors, places, *kind))[0]
    return bool(torch.allclose(unrotated(rope, turned, places[0]), vectors, rtol=0, atol=_TOLERANCE))
