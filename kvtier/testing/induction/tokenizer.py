"""Word-level tokenizer of a document: one token per word, the needle words included."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvtier.errors import InputError
from kvtier.testing.induction.document import FRAME_WORDS
from kvtier.testing.induction.spec import InductionSpec
from kvtier.testing.induction.words import (
    BOS,
    EOS,
    NEEDLE_KEYS,
    NEEDLE_VALUES,
    PAD,
    SPECIAL_WORDS,
    UNK,
    WORD_PATTERN,
    split_words,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer"]


def build_tokenizer(text: str, *, spec: InductionSpec | None = None) -> PreTrainedTokenizerFast:
    """Tokenizer of whole words: the special words, the needle words, then the document's words, most frequent first.

    It begins every text with its first-token word. Words of the document beyond ``spec.max_words`` are unknown.

    Raises
    ------
    InputError
        When the text holds no word.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    spec = spec or InductionSpec()
    vocabulary = {word: index for index, word in enumerate(_vocabulary(text, spec.max_words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=spec.max_positions,
    )


def _vocabulary(text: str, max_words: int) -> list[str]:
    """Words in the order of their token ids."""
    counts = Counter(text[start:end] for start, end in split_words(text))
    if not counts:
        raise InputError(
            f"a document must hold at least one word, got {len(text)} characters without one; pass another text"
        )
    fixed = (*SPECIAL_WORDS, *NEEDLE_KEYS, *NEEDLE_VALUES)
    for word in (*fixed, *FRAME_WORDS):
        counts.pop(word, None)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return [*fixed, *FRAME_WORDS, *ranked][: len(fixed) + max_words]
