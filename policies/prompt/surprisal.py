"""Surprisal: drop prompt tokens that the model could have guessed (after TCRA-LLM, Liu et al. 2023, 2310.15556)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from kvtier.core.policy import Need, PromptFilterPolicy
from kvtier.errors import CompositionError, PolicyError
from kvtier.policies.prompt.ranking import best_tokens, check_edges, edges
from kvtier.policies.prompt.words import mean_of_words, word_starts
from kvtier.types import KVLayout

__all__ = ["Surprisal"]

_TELL = "give the policy as Surprisal(unit='word').reading(tokenizer)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surprisal(PromptFilterPolicy):
    """Run only the tokens that carry the most information for the model itself, and the protected ones.

    Parameters
    ----------
    keep : int, optional
        Prompt tokens that are run, protected ones included; None takes the ``keep`` of the patch.
    kernel : int
        Width of the mean over neighbouring tokens, odd; 1 judges every token alone, more keeps phrases together.
    prefix, suffix : int
        Tokens at the beginning (instructions) and at the end (the question) that are always run.
    separator : int, optional
        Token id that stands between passages: always run, after beginning and end.
    unit : "token" | "word"
        What is judged: every token, or the word that it belongs to, by the mean of its tokens, which are the nats that
        one token of the budget buys. Words are run whole, but for the last one where the budget ends inside it.
    starts : frozenset of int, optional
        Token ids that begin a word, for ``unit="word"``; ``reading`` takes them from a tokenizer.

    Notes
    -----
    The paper compresses retrieval-augmented prompts in two ways: it has a second model summarise them, and it removes
    words that matter little for the meaning of the text, by the distance of sentence embeddings. This is the second
    one without a second model: a token's weight is its surprisal, -log p(token | all before it), from one run of the
    model over the prompt. Summarising is another kind of policy and not offered.

    That first run costs a whole prefill: what is saved is memory and decode time, not time to the first token.
    """

    name: ClassVar[str] = "surprisal"
    paper: ClassVar[str] = "after TCRA-LLM, Liu et al. 2023, arXiv 2310.15556, semantic compression"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SURPRISAL, Need.PROMPT_TOKENS})
    query_aware: ClassVar[bool] = False

    keep: int | None = None
    kernel: int = 1
    prefix: int = 32
    suffix: int = 32
    separator: int | None = None
    unit: Literal["token", "word"] = "token"
    starts: frozenset[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_edges(self.name, self.keep, self.prefix, self.suffix)
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"surprisal: kernel must be an odd integer of at least 1, got {self.kernel!r}")
        if self.separator is not None and (type(self.separator) is not int or self.separator < 0):
            raise PolicyError(f"surprisal: separator must be a token id, got {self.separator!r}")
        if self.unit not in ("token", "word"):
            raise PolicyError(f"surprisal: unit must be 'token' or 'word', got {self.unit!r}")

    def reading(self, tokenizer: Any) -> Surprisal:
        """The same filter, which knows by this tokenizer where words begin."""
        return self if self.unit == "token" else replace(self, starts=word_starts(tokenizer))

    def check_layout(self, layout: KVLayout) -> None:
        """Refuse words that nobody has said the beginnings of."""
        del layout
        if self.unit == "word" and self.starts is None:
            raise CompositionError(f"surprisal judges words and knows of none; {_TELL}")

    def protected(self, tokens: int) -> torch.Tensor:
        """The first ``prefix`` and the last ``suffix`` tokens [T] bool."""
        return edges(tokens, self.prefix, self.suffix)

    def keep_tokens(self, token_ids: torch.Tensor, votes: torch.Tensor, keep: int) -> torch.Tensor:
        """The ``keep`` most surprising of ids [T] by their surprisal [T] in nats: indices, ascending."""
        pad = self.kernel // 2
        smooth = functional.avg_pool1d(
            votes.float()[None], self.kernel, stride=1, padding=pad, count_include_pad=False
        )[0]
        if self.unit == "word":
            if self.starts is None:
                raise PolicyError(f"surprisal judges words and knows of none; {_TELL}")
            smooth = mean_of_words(token_ids, smooth, self.starts).to(votes.device)
        certain = None if self.separator is None else (token_ids == self.separator).to(votes.device)
        return best_tokens(smooth, keep, prefix=self.prefix, suffix=self.suffix, certain=certain)
