"""A long text with facts in it, the constructed model that finds them, and what it answers under a policy."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import kvtier
from kvtier.testing.induction import (
    InductionSpec,
    build_model,
    build_tokenizer,
    plant_needles,
    question,
    read_default_document,
)

if TYPE_CHECKING:
    from kvtier.integrations.hf.patch import PatchHandle

__all__ = ["Scene", "build_scene"]

_VALUES = 3  # words of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What questions are asked of.

    Parameters
    ----------
    spec : InductionSpec
        Which layer does what.
    shared : Tensor
        Ids [1, T] of the text.
    questions, answers : tuple of Tensor
        Ids [1, n], one of each a fact.
    budget : int
        Tokens that a policy may keep or read.
    """

    model: Any
    spec: InductionSpec
    shared: torch.Tensor
    questions: tuple[torch.Tensor, ...]
    answers: tuple[torch.Tensor, ...]
    budget: int

    @property
    def asked(self) -> int:
        """Questions."""
        return len(self.questions)

    def found_at_once(self, policy: str) -> int:
        """Facts that are found when text and question are one prompt."""
        with self._patched(policy) as handle:
            return sum(self._right(index, handle.new_cache()) for index in range(self.asked))

    def found_later(self, policy: str) -> int:
        """Facts that are found when the text is run alone, once, and each question comes after it."""
        with self._patched(policy) as handle:
            cache = handle.new_cache()
            self.model.generate(
                self.shared, attention_mask=torch.ones_like(self.shared), past_key_values=cache, max_new_tokens=1
            )
            return sum(self._right(index, copy.deepcopy(cache)) for index in range(self.asked))

    def _patched(self, policy: str) -> PatchHandle:
        print(f"claims: {policy}", file=sys.stderr, flush=True)
        return kvtier.patch(self.model, policy)

    def _right(self, index: int, cache: Any) -> bool:
        prompt, answer = torch.cat([self.shared, self.questions[index]], dim=1), self.answers[index]
        try:
            said = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=answer.shape[1],
            )
        finally:
            cache.close()
        return torch.equal(said[:, prompt.shape[1] :], answer)


def build_scene(*, context: int, needles: int, layers: int, share: int, seed: int) -> Scene:
    """A prompt of ``context`` tokens with ``needles`` facts; policies may keep one token of ``share``."""
    document = plant_needles(read_default_document(context), count=needles, context=context, seed=seed, values=_VALUES)
    spec = InductionSpec(num_layers=layers)
    tokenizer = build_tokenizer(document.text, spec=spec)

    def encode(words: str, *, first: bool) -> torch.Tensor:
        ids: torch.Tensor = tokenizer(words, return_tensors="pt", add_special_tokens=first)["input_ids"]
        return ids

    return Scene(
        model=build_model(tokenizer, spec=spec),
        spec=spec,
        shared=encode(document.text, first=True),
        questions=tuple(encode(question(needle), first=False) for needle in document.needles),
        answers=tuple(encode(needle.answer, first=False) for needle in document.needles),
        budget=context // share,
    )
