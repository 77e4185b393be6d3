"""Ask a model for every needle of a document: the prompt's shared part runs once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.testing.induction.document import Needle, PlantedDocument, question

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["answer_needles", "lost_needles"]


def answer_needles(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, document: PlantedDocument
) -> tuple[str, ...]:
    """What the model says to each question, greedily, with the stock cache; one answer a needle, in their order."""
    import torch
    from transformers import DynamicCache

    def encode(text: str, *, first: bool) -> torch.Tensor:
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=first)
        return torch.as_tensor(encoded["input_ids"], device=model.device)

    cache = DynamicCache(config=model.config)
    shared = encode(document.text, first=True)
    answers = []
    with torch.inference_mode():
        model(input_ids=shared, past_key_values=cache, logits_to_keep=1)
        for needle in document.needles:
            said = _continue(model, cache, encode(question(needle), first=False), len(needle.values))
            answers.append(str(tokenizer.decode(said)))
            # A negative number, the tokens to forget, is what every transformers version accepts.
            cache.crop(shared.shape[1] - cache.get_seq_length())
    return tuple(answers)


def lost_needles(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, document: PlantedDocument
) -> list[tuple[Needle, str]]:
    """Needles that the model does not find, each with what it said instead; empty when it finds all."""
    answers = answer_needles(model, tokenizer, document)
    return [(needle, said) for needle, said in zip(document.needles, answers, strict=True) if said != needle.answer]


def _continue(model: LlamaForCausalLM, cache: DynamicCache, tokens: torch.Tensor, count: int) -> list[int]:
    """The ``count`` most likely tokens, one after the other, after ``tokens`` [1, T]."""
    said: list[int] = []
    for _ in range(count):
        tokens = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(dim=-1)
        said.append(int(tokens))
    return said
