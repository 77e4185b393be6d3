"""What ``handle.explain()`` tells: the tokens that were run, kept and read, against what policies decided."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import kvtier
from kvtier.core.policy import ZonePlan
from kvtier.errors import InputError, SessionStateError
from kvtier.policies.prompt.gemfilter import GemFilter
from kvtier.policies.retrieval.quest import Quest
from kvtier.testing.tiny_models import left_padded, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
STORE = {"tiers": [{"name": "host", "backend": "host", "capacity": "32MiB"}], "page_tokens": 4, "block_tokens": 8}


def positions(runs: Any) -> list[int]:
    return [place for start, stop, *_ in runs.tolist() for place in range(start, stop)]


def test_full_keeps_and_reads_everything() -> None:
    model = tiny_model("llama")
    prompt = left_padded([30, 19])
    with kvtier.patch(model, "full", explain=True, store=STORE) as handle:
        out = model.generate(**prompt, **GREEDY)
        stories = [handle.explain(0), handle.explain(1)]

    for row, (story, length) in enumerate(zip(stories, (30, 19), strict=True)):
        assert story.policy == "full"
        assert story.token_ids.tolist() == out[row, 30 - length : -1].tolist()
        assert story.run.tolist() == list(range(length + 3))
        assert story.votes is None
        for layer in story.layers:
            assert [runs.tolist() for runs in layer.kept] == [[[0, length + 3]]]
            assert layer.steps == 3
            assert [positions(runs) for runs in layer.read] == [list(range(length + 3))] * 2
            assert all(runs[0, 2] == 3 for runs in layer.read), "what was there before the first step"
    assert json.loads(json.dumps(stories[0].to_dict()))["layers"][0]["kept"] == [[[0, 33]]]


CHOSEN: list[torch.Tensor] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Told(Quest):
    """Quest that says what it chose."""

    name: ClassVar[str] = "told"

    def choose(self, scores: torch.Tensor, pages: int) -> ZonePlan:
        plan = Quest.choose(self, scores, pages)
        CHOSEN.append(plan.pages)
        return plan


@pytest.mark.parametrize("device", [None, "64KiB"])
def test_pages_are_counted_as_they_are_chosen(device: str | None) -> None:
    model = tiny_model("llama")
    prompt = left_padded([64])["input_ids"]
    CHOSEN.clear()
    policy = Told(read=16, dense_layers=1)
    with kvtier.patch(model, policy, explain=True, store=STORE, device=device) as handle:
        model.generate(prompt, **GREEDY)
        dense, sparse = handle.explain().layers

    assert {count for runs in dense.read for *_, count in runs.tolist()} <= {1, 2, 3}
    assert sparse.steps == len(CHOSEN) == 3
    for head, runs in enumerate(sparse.read):
        expected = torch.zeros(16, dtype=torch.long)
        for plan in CHOSEN:
            expected[plan[0, head]] += 1
        got = torch.zeros(67, dtype=torch.long)
        for start, stop, count in runs.tolist():
            got[start:stop] = count
        assert got[:64].tolist() == expected.repeat_interleave(4).tolist()


def test_eviction_tells_what_each_head_kept() -> None:
    model = tiny_model("llama")
    prompt = left_padded([60])["input_ids"]
    with kvtier.patch(model, "snapkv(keep=20, window=4, kernel=1)", explain=True, store=STORE) as handle:
        model.generate(prompt, **GREEDY)
        story = handle.explain()

    for layer in story.layers:
        kept = [positions(runs) for runs in layer.kept]
        assert [len(own) for own in kept] == [23, 23]
        assert all(own[-7:] == list(range(56, 63)) for own in kept)
        assert kept[0] != kept[1], "heads choose apart"
        assert [positions(runs) for runs in layer.read] == kept


@pytest.mark.parametrize("policy", ["h2o(keep=20, recent=8)", "streamingllm(keep=20, sinks=4)", "tova(keep=20)"])
def test_policies_that_evict_every_step_tell_what_is_left(policy: str) -> None:
    model = tiny_model("llama")
    prompt = left_padded([60])["input_ids"]
    with kvtier.patch(model, policy, explain=True, store=STORE) as handle:
        model.generate(prompt, **GREEDY)
        for layer in handle.explain().layers:
            assert all(len(positions(runs)) == 20 for runs in layer.kept)
            assert all(positions(runs)[-1] == 62 for runs in layer.kept)
            assert (layer.read, layer.steps) == (None, 0)


def test_sliding_windows_hold_their_window() -> None:
    model = tiny_model("gemma3")
    prompt = left_padded([120])["input_ids"]
    with kvtier.patch(model, "full", explain=True, store=STORE) as handle:
        model.generate(prompt, **GREEDY)
        story = handle.explain()
    for layer, shape in zip(story.layers, kvtier.KVLayout.of(model).layers, strict=True):
        (runs,) = layer.kept
        held = positions(runs)
        assert held[-1] == 122
        assert len(held) == 123 if shape.window is None else shape.window - 1 <= len(held) < 123


def test_a_filtered_prompt_is_told_in_the_tokens_that_were_given() -> None:
    model = tiny_model("llama")
    prompt = left_padded([40, 23])
    policy = GemFilter(keep=12, prefix=2, suffix=3)
    with kvtier.patch(model, policy, explain=True, store=STORE) as handle:
        cache = handle.new_cache()
        out = model.generate(**prompt, **GREEDY, past_key_values=cache)
        kept = [own.tolist() for own in cache.state.filtered.kept]
        stories = [handle.explain(row) for row in range(2)]
    for row, (story, length) in enumerate(zip(stories, (40, 23), strict=True)):
        assert story.policy == "gemfilter | full"
        assert story.token_ids.tolist() == out[row, 40 - length : -1].tolist()
        assert story.run.tolist() == [*kept[row], *range(length, length + 3)]
        assert story.votes is not None
        assert story.votes.shape == (length,)
        assert [runs.tolist() for runs in story.layers[0].kept] == [[[0, 15]]]


def test_beams_are_told_apart() -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])["input_ids"]
    with kvtier.patch(model, Quest(read=16, dense_layers=0), explain=True, store=STORE) as handle:
        cache = handle.new_cache()
        model.generate(prompt, **GREEDY, num_beams=3, past_key_values=cache)
        twin = handle.explain(2)
        assert handle.explain(0).token_ids[:40].tolist() == prompt[0].tolist()

    assert twin.layers[0].steps == 3
    with pytest.raises(SessionStateError, match="nothing to explain"), kvtier.patch(model, "full", explain=True) as new:
        new.explain()


def test_what_was_not_asked_for_is_not_told() -> None:
    model = tiny_model("llama")
    prompt = left_padded([12])["input_ids"]
    with kvtier.patch(model, "quest(read=128)") as handle:
        cache = handle.new_cache()
        model.generate(prompt, **GREEDY, past_key_values=cache)
        assert cache.session._batch.reads is None
        with pytest.raises(SessionStateError, match=r"patch\(\.\.\., explain=True\)"):
            handle.explain()
    with kvtier.patch(model, "full", explain=True) as handle:
        model.generate(prompt, **GREEDY)
        with pytest.raises(InputError, match="row must be 0 to 0, got 1"):
            handle.explain(1)
        model.generate(inputs_embeds=torch.zeros(1, 5, model.config.hidden_size), **GREEDY)
        with pytest.raises(SessionStateError, match="as embeddings"):
            handle.explain()
