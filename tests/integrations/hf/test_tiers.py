"""Exact tokens when an eighth of the pages fit the device, the rest on host and in a file, prefill included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvtier
from kvtier.core.memory import Memory
from kvtier.integrations.hf.layout import layout_of
from kvtier.testing.tiny_models import left_padded, tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_oss"]
LENGTHS = (700, 640)
SHARE = 8


def batch(model: Any) -> torch.Tensor:
    return model.generate(**left_padded(LENGTHS), do_sample=False, max_new_tokens=12)


def beams(model: Any) -> torch.Tensor:
    return model.generate(**left_padded(LENGTHS[:1]), do_sample=False, num_beams=2, max_new_tokens=12)


def two_turns(model: Any) -> torch.Tensor:
    first = model.generate(**left_padded(LENGTHS[:1]), do_sample=False, max_new_tokens=4)
    longer = torch.cat([first, left_padded([9], seed=1)["input_ids"]], dim=1)
    return model.generate(longer, attention_mask=torch.ones_like(longer), do_sample=False, max_new_tokens=4)


def budgets(model: Any, rows: int) -> tuple[int, int]:
    """Bytes of all pages of these rows, and a device budget of an eighth of them beside the sliding windows."""
    layout = layout_of(model)
    pages = rows * max(LENGTHS) * sum(layer.token_bytes for layer in layout.layers if layer.window is None)
    windows = sum(rows * (layer.window + 96) * layer.token_bytes for layer in layout.layers if layer.window is not None)
    return pages, pages // SHARE + windows


@pytest.mark.parametrize("mode", [batch, beams, two_turns], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_eighth_on_the_device(family: str, mode: Callable[[Any], torch.Tensor], tmp_path: Path) -> None:
    model = tiny_model(family, max_position_embeddings=1024)
    expected = mode(model)
    rows = 2 if mode is not two_turns else 1
    pages, device = budgets(model, rows)
    store = {
        "tiers": [
            {"name": "host", "backend": "host", "capacity": pages // 4},
            {"name": "nvme", "backend": "spill", "capacity": "16MiB", "path": tmp_path},
        ],
        "page_tokens": 4,
        "block_tokens": 8,
    }
    with kvtier.patch(model, "full", device=device, store=store) as handle:
        cache = handle.new_cache()
        got = mode(OnOneCache(model, cache))
        report = handle.report().to_dict()["bytes"]
        held = frame_bytes(handle.memory)

    assert torch.equal(got, expected)
    assert report["device"]["peak"] <= device
    assert held * SHARE <= pages
    assert report["host"]["peak"] > 0
    if mode is batch:
        assert report["nvme"]["peak"] > 0


def frame_bytes(memory: Memory) -> int:
    """Bytes of the frames on the device."""
    return sum(group.arena.total_frames * group.arena.frame_bytes for group in memory.groups)


class OnOneCache:
    """The model with one cache for every generate of a mode."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache

    def generate(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.model.generate(*args, past_key_values=self.cache, **options)
