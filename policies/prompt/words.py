"""Words of a prompt: which token ids begin one, and what a word's tokens are worth together."""

from __future__ import annotations

from typing import Any, Final

import torch

__all__ = ["mean_of_words", "word_starts"]

# How SentencePiece, byte-level and byte-fallback vocabularies write a space or a line break.
_MARKS: Final = ("▁", "Ġ", "Ċ", "ĉ", " ", "\n", "\t", "<0x0A>")
_JOINED: Final = "##"


def word_starts(tokenizer: Any) -> frozenset[int]:
    """Ids that begin a word: pieces that begin with space, special tokens, and what WordPiece does not join.

    In a vocabulary that marks neither, every token is a word.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        Of transformers, or anything with its ``convert_ids_to_tokens`` and ``all_special_ids``.
    """
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    marked = {token for token, piece in enumerate(pieces) if piece.startswith(_MARKS)}
    if not marked:
        marked = {token for token, piece in enumerate(pieces) if not piece.startswith(_JOINED)}
    return frozenset(marked | set(tokenizer.all_special_ids))


def mean_of_words(token_ids: torch.Tensor, votes: torch.Tensor, starts: frozenset[int]) -> torch.Tensor:
    """Votes [T], each the mean of the word that the token of ids [T] belongs to; fp64 on the CPU."""
    begins = torch.isin(token_ids.cpu(), torch.tensor(sorted(starts), dtype=torch.int64))
    word = begins.long().cumsum(0)
    totals = torch.bincount(word, votes.cpu().double())
    return (totals / torch.bincount(word).clamp(min=1))[word]
