"""Policies over tiers under a whole model, on a CPU and on CUDA: the tokens of stock transformers, and the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import kvtier
from kvtier.integrations.hf.layout import layout_of
from kvtier.testing.induction import (
    PlantedDocument,
    build_model,
    build_tokenizer,
    plant_needles,
    read_default_document,
)

CONTEXT, LONG_CONTEXT, SHARE, VALUES = 1024, 16384, 4, 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POLICIES = {"full": {}, "snapkv": {"keep": 384}, "quest": {"read": 384}}
SLACK = 8 << 20


class Scene(NamedTuple):
    """A document with needles, and prompts that end with the question about one of them."""

    document: PlantedDocument
    tokenizer: Any
    prompts: list[torch.Tensor]


def scene_of(context: int) -> Scene:
    document = plant_needles(read_default_document(context), count=2, context=context, values=VALUES)
    tokenizer = build_tokenizer(document.text)
    prompts = [tokenizer(document.prompt(needle), return_tensors="pt").input_ids for needle in document.needles]
    return Scene(document, tokenizer, prompts)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return scene_of(CONTEXT)


def answers(model: Any, scene: Scene) -> list[str]:
    """What the model says to each question, from an empty cache every time."""
    said = []
    for prompt in scene.prompts:
        out = model.generate(prompt.to(model.device), do_sample=False, max_new_tokens=VALUES)
        said.append(scene.tokenizer.decode(out[0, prompt.shape[1] :]))
    return said


def bounds(model: Any, policy: str, context: int, path: Path) -> dict[str, Any]:
    """Room for half of the pages of one prompt on the device, for a quarter in host memory, the rest goes to a file."""
    pages = context * layout_of(model).token_bytes
    tiers = [
        {"name": "host", "backend": "host", "capacity": pages // SHARE},
        {"name": "nvme", "backend": "spill", "capacity": 2 * pages, "path": path},
    ]
    store = {"tiers": tiers, "page_tokens": 4, "block_tokens": 8}
    # What an eviction keeps fits anyway, but not what it chooses from.
    return {"device": None if policy == "snapkv" else 2 * pages // SHARE, "store": store}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_needle_is_found_in_every_tier(policy: str, device: str, scene: Scene, tmp_path: Path) -> None:
    model: Any = build_model(scene.tokenizer).to(device)
    expected = answers(model, scene)
    assert expected == [needle.answer for needle in scene.document.needles]
    places = bounds(model, policy, CONTEXT, tmp_path)
    with kvtier.patch(model, policy, **POLICIES[policy], **places) as handle:
        assert answers(model, scene) == expected
        report = handle.report().to_dict()
    if policy != "snapkv":
        assert report["bytes"]["device"]["peak"] <= places["device"]
        assert report["bytes"]["host"]["peak"] > 0
        assert report["bytes"]["nvme"]["peak"] > 0
    else:
        assert report["kept"] < CONTEXT // 2


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_cuda_allocates_what_the_report_says(policy: str, tmp_path: Path) -> None:
    scene = scene_of(LONG_CONTEXT)
    model: Any = build_model(scene.tokenizer).to("cuda")
    prompt = scene.prompts[0].to("cuda")
    # The first call also loads libraries and their workspaces.
    model(prompt, use_cache=False, logits_to_keep=1)
    activations = peak_of(lambda: model(prompt, use_cache=False, logits_to_keep=1))
    with kvtier.patch(model, policy, **POLICIES[policy], **bounds(model, policy, LONG_CONTEXT, tmp_path)) as handle:
        cache = handle.new_cache()
        peak = peak_of(lambda: model.generate(prompt, do_sample=False, max_new_tokens=VALUES, past_key_values=cache))
        held = handle.report().to_dict()["bytes"]["device"]["peak"]
    # Twice the activations: queries and outputs are also held in fp32, per part of the keys.
    assert peak <= held + 2 * activations + SLACK


def peak_of(call: Any) -> int:
    """Bytes that CUDA held at most during a call, above what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
