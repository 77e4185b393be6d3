"""Words of the induction model: how text splits, and the words that only needles use. Standard library only."""

from __future__ import annotations

import re
from itertools import product

__all__ = ["BOS", "EOS", "NEEDLE_KEYS", "NEEDLE_VALUES", "PAD", "SPECIAL_WORDS", "UNK", "WORD_PATTERN", "split_words"]

BOS, EOS, PAD, UNK = "<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"
SPECIAL_WORDS = (BOS, EOS, PAD, UNK)

# Explicit ASCII classes: Python's re and the tokenizer's engine disagree on what \w and \s hold outside ASCII.
WORD_PATTERN = r"[A-Za-z]+(?:-[A-Za-z]+)+|[A-Za-z0-9_]+|[^A-Za-z0-9_ \t\n\r\f\v]+"

_COLOURS = ("amber", "azure", "coral", "ebony", "ivory", "jade", "ochre", "scarlet")
_ANIMALS = ("badger", "condor", "falcon", "heron", "ibex", "lynx", "marten", "osprey")

NEEDLE_KEYS = tuple(f"{colour}-{animal}" for colour, animal in product(_COLOURS, _ANIMALS))
# 37 is coprime to 9000: 512 different four-digit numbers, spread out.
NEEDLE_VALUES = tuple(str(1000 + (3821 + 37 * step) % 9000) for step in range(512))

_WORD = re.compile(WORD_PATTERN)


def split_words(text: str) -> list[tuple[int, int]]:
    """Character ranges ``(start, end)`` of the words of a text, exactly as the tokenizer splits it."""
    return [match.span() for match in _WORD.finditer(text)]
