"""The text of a prompt, token by token: pieces that together are the text itself, spaces included."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["pieces_of"]


def pieces_of(tokenizer: Any, text: str, ids: torch.Tensor) -> list[str]:
    """The piece of ``text`` that each of its ids [T] stands for, with what follows it up to the next one.

    A tokenizer that cannot say where its tokens stand is asked to decode each of them.
    """
    wanted = ids.tolist()
    if tokenizer.is_fast:
        for special in (True, False):
            found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            if found["input_ids"] == wanted:
                return _cut(text, found["offset_mapping"])
    return [str(tokenizer.decode([token])) for token in wanted]


def _cut(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """Cut a text where tokens begin; those without characters of their own, such as the first token, get none."""
    begins, last = [], 0
    for start, stop in offsets:
        begins.append(start if start >= last and stop > start else last)
        last = max(last, stop)
    begins = [0, *begins[1:], len(text)]
    return [text[start:stop] for start, stop in pairwise(begins)]
