"""Ask a model for every needle of a document: the prompt's shared part runs once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.testing.induction.document import Needle, PlantedDocument, question

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["answer_needles", "lost_needles"]


def answer_needles(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, document: PlantedDocument) -> list[str]:
    """What the model says to each question, greedily, with the stock cache; one answer a needle, in their order."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    shared = tokenizer(document.text, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        model(shared, past_key_values=cache, logits_to_keep=1)
    answers = []
    for needle in document.needles:
        own = tokenizer(question(needle), return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        prompt = torch.cat((shared, own), dim=1)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=len(needle.values),
        )
        answers.append(tokenizer.decode(output[0, prompt.shape[1] :]))
        # Negative: every transformers version reads it as the number of tokens to forget.
        cache.crop(shared.shape[1] - cache.get_seq_length())
    return answers


def lost_needles(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, document: PlantedDocument
) -> list[tuple[Needle, str]]:
    """Needles that the model does not find, each with what it said instead; empty when it finds all."""
    answers = answer_needles(model, tokenizer, document)
    return [(needle, said) for needle, said in zip(document.needles, answers, strict=True) if said != needle.answer]
