"""The models: a random Llama whose heads differ, for time and bytes, and the induction model, which finds facts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.policies.settings import Settings

__all__ = ["Question", "save_induction", "save_random"]

_VOCABULARY = 512


class Question(NamedTuple):
    """A prompt, and what comes after it if the model finds the fact it is asked for."""

    ids: list[int]
    answer: list[int]


def save_random(settings: Settings, folder: Path) -> list[int]:
    """A random Llama, written there, and a random prompt for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = settings.hidden // 64
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2 * settings.context,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:
            projection = layer.self_attn.q_proj.weight
            # Sharper queries than at the start of a training, by another factor in each head.
            factors = torch.linspace(2.0, 12.0, heads)[torch.randperm(heads)]
            projection.data.mul_(factors.repeat_interleave(64)[:, None])
        prompt = torch.randint(3, _VOCABULARY, (settings.context,)).tolist()
    model.save_pretrained(folder)
    return prompt


def save_induction(settings: Settings, folder: Path) -> list[Question]:
    """The induction model for a text with needles, written there, and a question for each of them."""
    from kvtier.testing.induction import (
        build_model,
        build_tokenizer,
        plant_needles,
        question,
        read_default_document,
        save,
    )

    text = read_default_document(settings.induction_context)
    document = plant_needles(text, count=settings.needles, context=settings.induction_context, seed=0, values=4)
    tokenizer = build_tokenizer(document.text)
    save(folder, build_model(tokenizer), tokenizer)

    def encode(words: str, *, first: bool) -> list[int]:
        ids: list[int] = tokenizer(words, add_special_tokens=first)["input_ids"]
        return ids

    shared = encode(document.text, first=True)
    return [
        Question(shared + encode(question(needle), first=False), encode(needle.answer, first=False))
        for needle in document.needles
    ]
