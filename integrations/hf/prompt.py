"""What one call of ``generate`` is about to feed: checked before anything runs, and cut where memory asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvtier.errors import InputError, MaskError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.columns import real_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Prompt", "Split", "read_prompt", "split_forward"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The part of a prompt that is not in the cache yet.

    Parameters
    ----------
    columns : int
        New columns, padding included.
    rows : int
        Sequences that will run, beams and returned sequences counted.
    has_ids : bool
        Whether it comes as token ids, not as embeddings.
    tokens : int
        New tokens of the rows that were given, padding not counted.
    """

    columns: int
    rows: int
    has_ids: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Split:
    """How wide forwards are cut.

    Parameters
    ----------
    widest : int, optional
        The most columns at once.
    apart : bool
        Run the columns whose logits are wanted apart from those before: drafted tokens, which may be taken back, apart
        from the prompt.
    """

    widest: int | None
    apart: bool = False


def read_prompt(model: PreTrainedModel, call: dict[str, Any], cached: int) -> Prompt:
    """Check the prompt of a ``generate`` call.

    Parameters
    ----------
    call : dict
        The arguments of ``generate`` by name.
    cached : int
        Columns that the cache holds already.

    Raises
    ------
    InputError
        For a prompt without tokens, without new tokens, or longer than the model's positions.
    MaskError
        For a hole in the mask, or padding on the right, where generated tokens would follow it.
    """
    ids = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    embeds = call.get("inputs_embeds")
    given = embeds if embeds is not None else ids
    mask = call.get("attention_mask")
    spread = max(compat.generation_option(model, name, call) or 1 for name in ("num_beams", "num_return_sequences"))
    if given is None:
        return Prompt(1, spread, has_ids=True, tokens=1)
    batch, length = int(given.shape[0]), int(given.shape[1])
    if batch == 0 or length == 0:
        raise InputError(f"a prompt needs at least one token, got ids of shape {list(given.shape)}")
    # transformers takes ids as long as the mask for the whole sequence, and shorter ones for what is new.
    whole = mask is None or mask.shape[1] == length
    columns = length - cached if whole else length
    if columns < 1:
        raise InputError(
            f"the cache holds {cached} tokens and the prompt is {length}; append at least one new token to it"
        )
    _check_positions(model, mask, cached, columns)
    if mask is not None:
        _check_padding(mask, columns)
    tokens = batch * columns if mask is None else int(mask[:, -columns:].sum())
    return Prompt(columns, batch * spread, has_ids=embeds is None, tokens=tokens)


def split_forward(run: Callable[..., Any], call: dict[str, Any], cached: int, split: Split) -> dict[str, Any]:
    """Run the first columns of a forward on their own, and return the arguments that are left to run.

    Only for a forward that wants the logits of its last columns alone; any other is left whole.

    Parameters
    ----------
    run : callable
        The model's forward.
    call : dict
        Arguments of ``forward`` by name.
    """
    name = "input_ids" if call.get("input_ids") is not None else "inputs_embeds"
    keep = call.get("logits_to_keep")
    if not isinstance(keep, int) or keep < 1 or call.get(name) is None:
        return call
    width = int(call[name].shape[1])
    widest = width if split.widest is None else split.widest
    head = width - (keep if split.apart else max(keep, widest))
    for start in range(0, head, widest):
        part = _columns_of(call, name, cached, start, min(start + widest, head))
        run(**{**part, "logits_to_keep": 1})
    return call if head <= 0 else _columns_of(call, name, cached, head, width)


def _columns_of(call: dict[str, Any], name: str, cached: int, start: int, stop: int) -> dict[str, Any]:
    """The arguments of a forward over columns ``start`` to ``stop`` of ``call``."""
    width = call[name].shape[1]
    part = {**call, name: call[name][:, start:stop]}
    if (mask := call.get("attention_mask")) is not None and mask.shape[-1] == cached + width:
        part["attention_mask"] = mask[:, : cached + stop]
    if (positions := call.get("position_ids")) is not None and positions.shape[-1] == width:
        part["position_ids"] = positions[..., start:stop]
    return part


def _check_positions(model: PreTrainedModel, mask: torch.Tensor | None, cached: int, columns: int) -> None:
    limit = getattr(compat.text_config(model), "max_position_embeddings", None)
    tokens = cached + columns if mask is None else int(mask.sum(dim=1).max())
    if limit is not None and tokens > limit:
        raise InputError(
            f"the model has {limit} positions, got a prompt of {tokens} tokens; shorten it by {tokens - limit}"
        )


def _check_padding(mask: torch.Tensor, columns: int) -> None:
    new = mask[:, -columns:].bool().cpu()
    spans = real_spans(new)
    empty = [row for row, span in enumerate(spans) if span.start == span.stop]
    if empty:
        raise InputError(f"a prompt needs at least one token, and the mask of row {empty[0]} has none; drop the row")
    right = [row for row, span in enumerate(spans) if span.stop < columns]
    if right:
        raise MaskError(
            f"prompts must be padded on the left, and row {right[0]} is padded on the right; "
            "set tokenizer.padding_side = 'left'"
        )
