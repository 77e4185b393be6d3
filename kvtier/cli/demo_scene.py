"""What every row of ``kvtier demo`` is asked: a long text with needles, questions, and a model that can find them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtier.cli.generate_inputs import read_document
from kvtier.testing.induction import (
    PlantedDocument,
    build_model,
    build_tokenizer,
    plant_needles,
    question,
    read_default_document,
)

if TYPE_CHECKING:
    import torch

__all__ = ["Scene", "build_scene"]

_VALUES: Final = 4  # words of an answer: what the neighbourhood of one hit, as SnapKV keeps it, can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The text, the questions and the model.

    Parameters
    ----------
    shared : Tensor
        Token ids [1, T] of the text: what every prompt begins with.
    questions : tuple of Tensor
        Token ids [1, Tq] that follow it, one question a needle.
    answers : tuple of tuple of int
        Token ids of the right answers.
    kv_bytes : int
        Bytes of K and V of a whole prompt.
    source : str
        Where the text comes from.
    """

    model: Any
    document: PlantedDocument
    shared: torch.Tensor
    questions: tuple[torch.Tensor, ...]
    answers: tuple[tuple[int, ...], ...]
    kv_bytes: int
    source: str


def build_scene(path: Path | None, *, context: int, needles: int, seed: int) -> Scene:
    """Plant needles in the text of a file, or in the sources of Python, and set up the model for its words.

    Raises
    ------
    InputError
        For a file that cannot be read, or a text too short for the context.
    """
    from kvtier.integrations.hf.layout import layout_of

    text = read_document(path) if path is not None else read_default_document(context)
    document = plant_needles(text, count=needles, context=context, seed=seed, values=_VALUES)
    tokenizer = build_tokenizer(document.text)
    model = build_model(tokenizer)

    def encode(words: str, *, first: bool) -> torch.Tensor:
        ids: torch.Tensor = tokenizer(words, return_tensors="pt", add_special_tokens=first)["input_ids"]
        return ids

    return Scene(
        model=model,
        document=document,
        shared=encode(document.text, first=True),
        questions=tuple(encode(question(needle), first=False) for needle in document.needles),
        answers=tuple(tuple(encode(needle.answer, first=False)[0].tolist()) for needle in document.needles),
        kv_bytes=context * layout_of(model).token_bytes,
        source=path.name if path is not None else "sources of Python's standard library",
    )
