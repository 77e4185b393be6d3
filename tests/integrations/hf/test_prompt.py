"""Prompts announced to the session, and cut into chunks that fit the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtier.integrations.hf.patch import PatchHandle
from kvtier.integrations.hf.prompt import Split, split_forward
from kvtier.testing.oracles import PlainSession
from kvtier.testing.tiny_models import left_padded, tiny_model

Attach = Callable[..., PatchHandle]

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What sessions are told: ("expect", columns) and, for layer 0, ("append", columns)."""
    entries: list[tuple[str, int]] = []
    expect, append = PlainSession.expect, PlainSession.append

    def logged_expect(self: PlainSession, tokens: int) -> None:
        entries.append(("expect", tokens))
        expect(self, tokens)

    def logged_append(self: PlainSession, layer: int, k: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if layer == 0:
            entries.append(("append", k.shape[2]))
        append(self, layer, k, *args, **kwargs)

    monkeypatch.setattr(PlainSession, "expect", logged_expect)
    monkeypatch.setattr(PlainSession, "append", logged_append)
    return entries


def widths(log: list[tuple[str, int]]) -> list[int]:
    return [columns for what, columns in log if what == "append"]


def announced(log: list[tuple[str, int]]) -> list[int]:
    return [columns for what, columns in log if what == "expect"]


@pytest.mark.parametrize(
    ("fits", "wished", "expected"),
    [
        pytest.param(None, None, [20], id="no_bound"),
        pytest.param(32, None, [20], id="fits"),
        pytest.param(8, None, [8, 8, 4], id="does_not_fit"),
        pytest.param(8, 6, [6, 6, 6, 2], id="smaller_wish_wins"),
        pytest.param(8, 16, [8, 8, 4], id="larger_wish_loses"),
        pytest.param(None, 16, [16, 4], id="wish_alone"),
    ],
)
def test_a_prompt_is_cut_to_fit(
    attached: Attach, log: Any, fits: int | None, wished: int | None, expected: list[int]
) -> None:
    model = tiny_model("llama")
    prompt = left_padded([20, 13])
    stock = model.generate(**prompt, **GREEDY)
    with attached(model, max_prefill=fits):
        options = {} if wished is None else {"prefill_chunk_size": wished}
        assert model.generate(**prompt, **GREEDY, **options).tolist() == stock.tolist()
    assert widths(log) == [*expected, 1, 1, 1]
    assert announced(log) == [20]
    assert log[0] == ("expect", 20)


def test_a_continued_prompt_is_cut_too(attached: Attach, log: Any) -> None:
    model = tiny_model("mistral")
    tokens = left_padded([40])["input_ids"]
    stock = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    with attached(model, max_prefill=8) as handle:
        cache = handle.new_cache()
        model(tokens[:, :5], past_key_values=cache)
        log.clear()
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **GREEDY)
        assert out.tolist() == stock.tolist()
        assert (widths(log), announced(log)) == ([8, 8, 8, 3, 8, 1, 1, 1], [35])
        # New tokens alone, under the mask of all.
        cache = handle.new_cache()
        model(tokens[:, :5], past_key_values=cache)
        log.clear()
        out = model.generate(tokens[:, 5:], attention_mask=torch.ones_like(tokens), past_key_values=cache, **GREEDY)
        assert out.tolist() == stock[:, 5:].tolist()
        assert (widths(log), announced(log)) == ([8, 8, 8, 3, 8, 1, 1, 1], [35])


def test_drafted_tokens_are_fed_apart_from_the_prompt(attached: Attach, log: Any) -> None:
    model = tiny_model("llama")
    prompt = left_padded([5])["input_ids"].repeat(1, 4)
    mask = torch.ones_like(prompt)
    stock = model.generate(prompt, attention_mask=mask, **GREEDY)
    with attached(model, max_prefill=8):
        out = model.generate(prompt, attention_mask=mask, prompt_lookup_num_tokens=3, **GREEDY)
    assert out.tolist() == stock.tolist()
    # The last token of the prompt goes with the draft: its logits judge it.
    assert announced(log) == [19]
    assert widths(log)[:4] == [8, 8, 3, 4]


def test_an_assistant_announces_its_prompt_once(attached: Attach, log: Any) -> None:
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=3)
    with attached(assistant):
        model.generate(**left_padded([12]), **GREEDY, assistant_model=assistant)
    assert announced(log) == [12]
    assert len(widths(log)) > 3


def test_beams_and_returned_sequences_count_as_rows(attached: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    asked: list[int] = []
    with attached(model) as handle:
        monkeypatch.setattr(handle.memory, "max_prefill_chunk", asked.append)
        model.generate(**left_padded([6, 5]), **GREEDY)
        model.generate(**left_padded([6, 5]), **GREEDY, num_beams=3)
        model.generate(**left_padded([6, 5]), max_new_tokens=2, do_sample=True, num_return_sequences=4)
    assert asked == [2, 6, 8]


def test_a_prompt_that_is_only_the_beginning_token(attached: Attach, log: Any) -> None:
    model = tiny_model("llama")
    stock = model.generate(**GREEDY)
    with attached(model):
        assert model.generate(**GREEDY).tolist() == stock.tolist()
    assert announced(log) == [1]


@pytest.mark.parametrize("keep", [None, 0, torch.tensor([3])], ids=["absent", "all", "chosen"])
def test_a_forward_that_wants_all_logits_is_left_whole(keep: Any) -> None:
    call = {"input_ids": torch.zeros(1, 9, dtype=torch.long), "logits_to_keep": keep}

    def run(**part: Any) -> None:
        raise AssertionError(part)

    assert split_forward(run, call, 0, Split(2)) is call
