"""The part of a ``generate`` call that stored prefixes can serve: token ids and left padding, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvtier.integrations.hf import compat
from kvtier.integrations.hf.columns import Columns, real_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["StoredPrompt", "read_stored_prompt", "unservable"]

# What carries no contents of its own: inputs of the model that go with the ids, and helpers of `generate`.
_PLAIN = frozenset(
    {
        "assistant_tokenizer",
        "attention_mask",
        "input_ids",
        "logits_to_keep",
        "past_key_values",
        "tokenizer",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class StoredPrompt:
    """The rows of a prompt.

    Parameters
    ----------
    ids : Tensor
        [B, T] int64, on the CPU.
    real : Tensor
        [B, T] bool, on the CPU: tokens, not padding.
    """

    ids: torch.Tensor
    real: torch.Tensor

    @property
    def columns(self) -> int:
        """T."""
        return self.ids.shape[1]

    @property
    def left_padded(self) -> bool:
        """Whether all padding stands before all tokens."""
        return bool(self.real[:, -1].all()) and not bool((self.real[:, :-1] & ~self.real[:, 1:]).any())

    @property
    def padding(self) -> list[int]:
        """Columns of padding at the left of each row."""
        return [int(count) for count in (self.columns - self.real.sum(dim=1)).tolist()]

    @property
    def positions(self) -> torch.Tensor:
        """Positions [B, T] int64 that count the tokens of each row from 0; 0 on padding."""
        return (self.real.cumsum(dim=1) - 1).clamp(min=0)

    def head(self, columns: int) -> Columns:
        """The first columns, as a forward over them would bring them."""
        real = self.real[:, :columns]
        padded = not bool(real.all())
        return Columns(self.positions[:, :columns], real if padded else None, real_spans(real) if padded else None)

    def row(self, index: int) -> torch.Tensor:
        """The tokens of a row [n]."""
        return self.ids[index][self.real[index]]

    def repeated(self, times: int) -> StoredPrompt:
        """Each row ``times`` times, copies side by side, as beams are."""
        if times == 1:
            return self
        return StoredPrompt(self.ids.repeat_interleave(times, dim=0), self.real.repeat_interleave(times, dim=0))


def unservable(model: PreTrainedModel, call: dict[str, Any]) -> str:
    """Why the keys and values of this call do not follow from its token ids alone; empty when they do."""
    if call.get("inputs_embeds") is not None:
        return "the prompt came as embeddings"
    options = compat.generation_options(model)
    foreign = sorted(
        name for name, value in call.items() if value is not None and name not in options and name not in _PLAIN
    )
    return f"the model was given {', '.join(foreign)} beside token ids" if foreign else compat.rerouted(model)


def read_stored_prompt(model: PreTrainedModel, call: dict[str, Any]) -> StoredPrompt | str:
    """The prompt of a call to an empty cache, or why it cannot be looked up."""
    ids = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return "there is no prompt of token ids"
    ids = ids.detach().to(device="cpu", dtype=torch.int64)
    mask = call.get("attention_mask")
    if mask is None:
        pad = compat.generation_option(model, "pad_token_id", call)
        pad = pad.item() if isinstance(pad, torch.Tensor) else pad
        # transformers then takes some of these for padding, by rules of its own.
        if pad is not None and bool((ids == pad).any()):
            return "padding tokens without an attention_mask"
        return StoredPrompt(ids, torch.ones_like(ids, dtype=torch.bool))
    if tuple(mask.shape) != tuple(ids.shape):
        return "the attention_mask is longer than the prompt of an empty cache"
    return StoredPrompt(ids, mask.detach().to(device="cpu", dtype=torch.bool))
