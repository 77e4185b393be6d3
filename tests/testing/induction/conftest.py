"""One document with needles and its model, shared by the tests of this folder, and how to read its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from transformers import DynamicCache

from kvtier.testing.induction import (
    PlantedDocument,
    build_model,
    build_tokenizer,
    plant_needles,
    read_default_document,
)

WINDOW = 32

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


class Scene(NamedTuple):
    """A planted document and the model of its words."""

    document: PlantedDocument
    tokenizer: PreTrainedTokenizerFast
    model: LlamaForCausalLM


class Prefilled(NamedTuple):
    """A scene whose document the stock model has read, but for the last tokens: what comes next is ``WINDOW`` long.

    ``prompts`` holds, for each needle, the document's last tokens and the question, [1, WINDOW].
    """

    scene: Scene
    cache: DynamicCache
    prompts: list[Tensor]


def build_scene(context: int, needles: int) -> Scene:
    """Plant, then set the weights for the document's words."""
    document = plant_needles(read_default_document(context), count=needles, context=context, values=3)
    tokenizer = build_tokenizer(document.text)
    return Scene(document, tokenizer, build_model(tokenizer))


def prefill(scene: Scene) -> Prefilled:
    """Read what all prompts share."""
    document, tokenizer, model = scene
    prompts = [tokenizer(document.prompt(needle), return_tensors="pt").input_ids for needle in document.needles]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompts[0][:, :-WINDOW], past_key_values=cache, logits_to_keep=1)
    return Prefilled(scene, cache, [prompt[:, -WINDOW:] for prompt in prompts])


@pytest.fixture(scope="session")
def scene() -> Scene:
    return build_scene(4096, needles=12)


@pytest.fixture(scope="session")
def long_scene() -> Scene:
    return build_scene(16384, needles=32)


@pytest.fixture(scope="session")
def prefilled(scene: Scene) -> Prefilled:
    return prefill(scene)


@pytest.fixture(scope="session")
def long_prefilled(long_scene: Scene) -> Prefilled:
    return prefill(long_scene)
