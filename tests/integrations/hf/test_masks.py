"""Padding, positions and masks: what is honoured, and what is refused with a word on what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import masking_utils

from kvtier.errors import MaskError
from kvtier.integrations.hf.attention import attention, mask
from kvtier.integrations.hf.columns import real_spans
from kvtier.integrations.hf.patch import PatchHandle
from kvtier.testing.tiny_models import left_padded, tiny_model

Attach = Callable[..., PatchHandle]

IDS = left_padded([8, 8])["input_ids"]
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
HOLED = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1]])


def ones(columns: int) -> torch.Tensor:
    return torch.ones(2, columns, dtype=torch.long)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_forward_with_padding_on_either_side(family: str, use_cache: bool, under_each: Attach) -> None:
    model = tiny_model(family)
    for padding in (RIGHT_PADDED, RIGHT_PADDED.flip(1)):
        stock = model(IDS, attention_mask=padding).logits
        with under_each(model), torch.no_grad():
            logits = model(IDS, attention_mask=padding, use_cache=use_cache).logits
        torch.testing.assert_close(logits[padding.bool()], stock[padding.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_forward_without_a_cache(family: str, attached: Attach) -> None:
    model = tiny_model(family)
    stock = model(IDS, use_cache=False).logits
    with attached(model) as handle, torch.no_grad():
        output = model(IDS, use_cache=False)
        assert output.past_key_values is None
        assert handle.memory.sessions == []
    torch.testing.assert_close(output.logits, stock, atol=1e-4, rtol=1e-4)


def test_right_padding_then_more_tokens_is_one_sequence_a_row(under_each: Attach) -> None:
    model = tiny_model("llama")
    more = left_padded([3, 3], seed=1)["input_ids"]
    with under_each(model) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(IDS, attention_mask=RIGHT_PADDED, past_key_values=cache)
        grown = torch.cat([RIGHT_PADDED, ones(3)], dim=1)
        positions = torch.tensor([[8, 9, 10], [5, 6, 7]])
        logits = model(more, attention_mask=grown, position_ids=positions, past_key_values=cache).logits
    for row, length in enumerate([8, 5]):
        whole = torch.cat([IDS[row, :length], more[row]])[None]
        torch.testing.assert_close(logits[row], model(whole).logits[0, -3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        pytest.param(HOLED, "mask of row 1 has a hole between columns 1 and 7", id="hole"),
        pytest.param(ones(7), r"cover all 8 columns", id="too_short"),
        pytest.param(torch.ones(2, 1, 8, 8, dtype=torch.bool), r"must be \[2, 8\].*got \[2, 1, 8, 8\]", id="4d"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_masks_that_are_refused_in_forward(
    attached: Attach, padding: torch.Tensor, message: str, use_cache: bool
) -> None:
    model = tiny_model("llama")
    with attached(model), pytest.raises(MaskError, match=message):
        model(IDS, attention_mask=padding, use_cache=use_cache)


@pytest.mark.parametrize("chunk", [None, 2, 3], ids=lambda chunk: f"chunk_{chunk}")
@pytest.mark.parametrize(
    ("padding", "message"),
    [
        pytest.param(HOLED, "has a hole", id="hole"),
        pytest.param(RIGHT_PADDED, r"row 1 is padded on the right; set tokenizer\.padding_side", id="right"),
    ],
)
def test_prompts_that_are_refused(attached: Attach, padding: torch.Tensor, message: str, chunk: int | None) -> None:
    model = tiny_model("llama")
    with attached(model), pytest.raises(MaskError, match=message):
        model.generate(IDS, attention_mask=padding, prefill_chunk_size=chunk)


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param([[0, 1, 2, 3, 0, 1, 2, 3]], id="packed"),
        pytest.param([[0, 1, 2, 2, 3, 4, 5, 6]], id="repeated"),
        pytest.param([[7, 6, 5, 4, 3, 2, 1, 0]], id="backwards"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_positions_that_do_not_increase(attached: Attach, positions: list[list[int]], use_cache: bool) -> None:
    model = tiny_model("llama")
    with attached(model), pytest.raises(MaskError):
        model(IDS[:1], position_ids=torch.tensor(positions), use_cache=use_cache)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param({"attention_mask": torch.cat([HOLED, ones(1)], dim=1)}, "must repeat", id="past_changed"),
        pytest.param({}, "must repeat", id="padding_forgotten"),
        pytest.param({"attention_mask": ones(1)}, "cover all 9 columns", id="new_columns_only"),
        pytest.param(
            {
                "attention_mask": torch.cat([RIGHT_PADDED.flip(1), ones(1)], dim=1),
                "position_ids": torch.tensor([[7], [5]]),
            },
            "row 0 of the cache ends at position 7",
            id="position_again",
        ),
    ],
)
def test_a_second_forward_must_agree_with_the_first(attached: Attach, call: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    padding = RIGHT_PADDED.flip(1)
    with attached(model) as handle:
        cache = handle.new_cache()
        model(IDS, attention_mask=padding, past_key_values=cache)
        with pytest.raises(MaskError, match=message):
            model(IDS[:, :1], past_key_values=cache, **call)
        # The refusal came before anything was appended.
        model(IDS[:, :1], attention_mask=torch.cat([padding, ones(1)], dim=1), past_key_values=cache)
        assert cache.get_seq_length() == 9


def test_position_ids_of_another_shape(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model):
        q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
        with pytest.raises(MaskError, match=r"position_ids must be \[1 or 1, 8\]"):
            attention(
                model.model.layers[0].self_attn, q, k, k, None, position_ids=torch.zeros(3, 1, 8, dtype=torch.long)
            )


CAUSAL = masking_utils.causal_mask_function
WINDOWED = masking_utils.sliding_window_causal_mask_function(4)


@pytest.mark.parametrize("pattern", [CAUSAL, WINDOWED], ids=["causal", "sliding"])
def test_patterns_that_follow_from_positions(pattern: Callable[..., Any]) -> None:
    padding = RIGHT_PADDED.bool()
    assert mask(q_length=8, kv_length=8, mask_function=pattern) is None
    assert (
        mask(q_length=8, kv_length=8, mask_function=pattern, attention_mask=torch.ones(2, 8, dtype=torch.bool)) is None
    )
    assert mask(q_length=8, kv_length=8, mask_function=pattern, attention_mask=padding) is padding


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"mask_function": masking_utils.bidirectional_mask_function}, id="bidirectional"),
        pytest.param({"mask_function": masking_utils.or_masks(CAUSAL, CAUSAL)}, id="or"),
        pytest.param({"mask_function": masking_utils.and_masks(WINDOWED, lambda b, h, q, k: k == q)}, id="and"),
        pytest.param(
            {"mask_function": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))},
            id="chunked",
        ),
        pytest.param(
            {"mask_function": masking_utils.and_masks(CAUSAL, masking_utils.packed_sequence_mask_function(IDS))},
            id="packed",
        ),
        pytest.param({"mask_function": CAUSAL, "use_vmap": True}, id="vmap"),
        pytest.param({"mask_function": CAUSAL, "allow_is_causal_skip": False}, id="materialised"),
    ],
)
def test_patterns_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MaskError, match="causal and sliding-window masks with padding"):
        mask(q_length=8, kv_length=8, **options)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_spans_are_the_runs_of_tokens(rows: list[list[bool]]) -> None:
    holed = any("10" in "".join("01"[x] for x in row).strip("0") for row in rows)
    real = torch.tensor(rows)
    if holed:
        with pytest.raises(MaskError):
            real_spans(real)
        return
    for row, span in zip(rows, real_spans(real), strict=True):
        assert [column for column in range(6) if row[column]] == list(range(span.start, span.stop))
