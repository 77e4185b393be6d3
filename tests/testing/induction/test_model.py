"""The induction model with stock attention: finds every needle, is the same every time, survives saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvtier.errors import InputError
from kvtier.testing.induction import (
    InductionSpec,
    Needle,
    PlantedDocument,
    answer_needles,
    build_model,
    build_tokenizer,
    lost_needles,
    plant_needles,
    question,
    read_default_document,
    save,
)
from kvtier.testing.induction.words import split_words

NEEDLE = Needle(key="amber-falcon", values=("4821", "4858", "4895"), depth=0.0)


def plant_at(text: str, spans: list[tuple[int, int]], place: int) -> PlantedDocument:
    """The text with one needle before its word number ``place``."""
    cut = spans[place][0] if place < len(spans) else len(text)
    planted = f"{text[:cut]}\n{NEEDLE.sentence}\n{text[cut:]}"
    context = 1 + len(split_words(planted)) + len(split_words(question(NEEDLE)))
    return PlantedDocument(text=planted, needles=(NEEDLE,), context=context)


@pytest.mark.parametrize(("context", "values"), [(256, 4), (1024, 1), (1024, 4), (2048, 2)])
def test_finds_every_needle(context: int, values: int) -> None:
    document = plant_needles(read_default_document(context), count=8, context=context, values=values)
    tokenizer = build_tokenizer(document.text)

    assert lost_needles(build_model(tokenizer), tokenizer, document) == []


def test_finds_every_needle_in_4k(scene: Any) -> None:
    assert lost_needles(scene.model, scene.tokenizer, scene.document) == []


@pytest.mark.slow
def test_finds_every_needle_in_16k(long_scene: Any) -> None:
    assert lost_needles(long_scene.model, long_scene.tokenizer, long_scene.document) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finds_every_needle_in_16_bit(scene: Any, dtype: torch.dtype) -> None:
    model: Any = build_model(scene.tokenizer)
    model.to(dtype)

    assert lost_needles(model, scene.tokenizer, scene.document) == []


def test_finds_a_needle_wherever_it_stands() -> None:
    text = read_default_document(500)
    spans = split_words(text)[:500]
    text = text[: spans[-1][1]]
    tokenizer = build_tokenizer(text)
    model = build_model(tokenizer)

    for place in (0, 1, 13, 14, 15, 250, 499, 500):
        assert answer_needles(model, tokenizer, plant_at(text, spans, place)) == (NEEDLE.answer,), place


@pytest.mark.parametrize(
    "spec",
    [
        InductionSpec(num_layers=2, num_query_heads=2, num_kv_heads=1, head_dim=128),
        InductionSpec(num_layers=3, num_query_heads=2, num_kv_heads=2),
        InductionSpec(num_layers=6, num_query_heads=8, num_kv_heads=4, seed=7),
    ],
    ids=["two layers, one KV head of 128", "no groups", "six layers, four KV heads"],
)
def test_finds_every_needle_in_other_shapes(spec: InductionSpec) -> None:
    document = plant_needles(read_default_document(1024), count=8, context=1024, values=3)
    tokenizer = build_tokenizer(document.text, spec=spec)
    model = build_model(tokenizer, spec=spec)

    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (spec.num_layers, spec.num_kv_heads)
    assert lost_needles(model, tokenizer, document) == []


def test_a_fact_that_was_not_planted_is_not_found(scene: Any) -> None:
    absent = Needle(key=scene.document.needles[0].key, values=scene.document.needles[1].values, depth=0.0)
    document = PlantedDocument(text=scene.document.text, needles=(absent,), context=scene.document.context)

    ((needle, said),) = lost_needles(scene.model, scene.tokenizer, document)

    assert needle == absent
    assert said == scene.document.needles[0].answer


def test_two_builds_are_equal_bit_by_bit(scene: Any) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again = build_model(build_tokenizer(scene.document.text))

    assert torch.equal(torch.random.get_rng_state(), state)
    assert equal_bits(again, scene.model)
    assert not equal_bits(build_model(scene.tokenizer, spec=InductionSpec(seed=1)), scene.model)


def test_saved_and_loaded_is_the_same_and_generates(scene: Any, tmp_path: Path) -> None:
    save(tmp_path, scene.model, scene.tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    needle = scene.document.needles[7]
    inputs = tokenizer(scene.document.prompt(needle), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=len(needle.values))

    assert not list(tmp_path.glob("*.bin"))
    assert equal_bits(model, scene.model)
    assert tokenizer.get_vocab() == scene.tokenizer.get_vocab()
    assert inputs.input_ids.shape[1] == scene.document.context
    assert tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :]) == needle.answer


def test_a_batch_with_padding_on_the_left_answers_each_row(scene: Any) -> None:
    first, second = (
        plant_needles(read_default_document(size), count=1, context=size, seed=size) for size in (300, 421)
    )
    needles = (first.needles[0], second.needles[0])
    inputs = scene.tokenizer([first.prompt(needles[0]), second.prompt(needles[1])], return_tensors="pt", padding=True)
    tokens = scene.model.generate(**inputs, max_new_tokens=2)

    assert scene.tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :]) == [n.answer for n in needles]


def test_a_tokenizer_without_needle_words_is_refused(scene: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(InputError, match=r"it lacks 580, first '<\|bos\|>'; make it with build_tokenizer"):
        build_model(foreign)


def equal_bits(one: LlamaForCausalLM, other: LlamaForCausalLM) -> bool:
    """Whether two models have the same weights, bit by bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
