"""KVTierCache: the operations that transformers asks of a cache, each on the whole cache at once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache

from kvtier.errors import InputError, SessionStateError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.cache import KVTierCache
from kvtier.integrations.hf.patch import PatchHandle
from kvtier.testing.tiny_models import left_padded, tiny_model

Attach = Callable[..., PatchHandle]
Change = Callable[[KVTierCache], None]

PROMPT = left_padded([14, 9])
PROMPT["position_ids"] = (PROMPT["attention_mask"].cumsum(1) - 1).clamp(min=0)
NEXT = left_padded([2, 2], seed=1)["input_ids"]


def fed(model: Any, handle: PatchHandle) -> KVTierCache:
    cache = handle.new_cache()
    model(**PROMPT, past_key_values=cache)
    return cache


@torch.no_grad()
def next_logits(model: Any, cache: KVTierCache, rows: list[int], columns: int = 14) -> torch.Tensor:
    """Logits of the next two tokens of the prompt's rows, of which ``columns`` are in the cache."""
    mask = torch.cat([PROMPT["attention_mask"][rows, :columns], torch.ones(len(rows), 2, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -2:]
    logits: torch.Tensor = model(NEXT[rows], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return logits


@torch.no_grad()
def whole_logits(model: Any, rows: list[int], columns: int = 14) -> torch.Tensor:
    """The same, without any cache."""
    results = []
    for row in rows:
        kept = PROMPT["input_ids"][row, :columns][PROMPT["attention_mask"][row, :columns].bool()]
        results.append(model(torch.cat([kept, NEXT[row]])[None], use_cache=False).logits[0, -2:])
    return torch.stack(results)


@pytest.mark.parametrize(
    ("change", "rows", "columns"),
    [
        pytest.param(lambda cache: None, [0, 1], 14, id="nothing"),
        pytest.param(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0], 14, id="reorder"),
        pytest.param(lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1], 14, id="reorder_twice_the_same"),
        pytest.param(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1], 14, id="repeat_interleave"),
        pytest.param(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1], 14, id="select_numbers"),
        pytest.param(lambda cache: cache.batch_select_indices(torch.tensor([True, False])), [0], 14, id="select_mask"),
        pytest.param(lambda cache: cache.crop(-4), [0, 1], 10, id="crop"),
        pytest.param(lambda cache: cache.crop(0), [0, 1], 14, id="crop_nothing"),
    ],
)
def test_operations_on_the_whole_cache(under_each: Attach, change: Change, rows: list[int], columns: int) -> None:
    model = tiny_model("llama")
    expected = whole_logits(model, rows, columns)
    with under_each(model) as handle:
        cache = fed(model, handle)
        change(cache)
        assert cache.get_seq_length() == columns
        assert cache.session.rows == len(rows)
        torch.testing.assert_close(next_logits(model, cache, rows, columns), expected, atol=1e-4, rtol=1e-4)


def test_an_operation_reaches_the_session_once(attached: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = fed(model, handle)
        calls: list[list[int]] = []
        monkeypatch.setattr(cache.session, "reorder", calls.append)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert calls == [[1, 0]]


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_crop_past_the_window_needs_recording(under_each: Attach, family: str) -> None:
    model = tiny_model(family)
    expected = whole_logits(model, [0, 1], 10)
    with under_each(model) as handle:
        cache = handle.new_cache()
        cache.activate_past_recording()
        assert all(layer.record_past for layer in cache.layers)
        model(**PROMPT, past_key_values=cache)
        cache.crop(-4)
        torch.testing.assert_close(next_logits(model, cache, [0, 1], 10), expected, atol=1e-4, rtol=1e-4)
        for layer in cache.layers:
            layer.record_past = False
        assert not cache.layers[0].record_past


def test_crop_follows_the_version_of_transformers(attached: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = fed(model, handle)
        with pytest.raises(InputError, match="cannot forget 15"):
            cache.crop(-15)
        monkeypatch.setattr(compat.transformers, "__version__", "5.17.0")  # type: ignore[attr-defined]
        cache.crop(20)
        assert cache.get_seq_length() == 14
        cache.crop(10)
        assert cache.get_seq_length() == 10
        monkeypatch.setattr(compat.transformers, "__version__", "5.18.0")  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"write crop\(-10\)"):
            cache.crop(10)


def test_a_copy_grows_apart(under_each: Attach) -> None:
    model = tiny_model("llama")
    expected = whole_logits(model, [0, 1])
    with under_each(model) as handle:
        cache = fed(model, handle)
        fork = copy.deepcopy(cache)
        assert fork is not cache
        cache.reorder_cache(torch.tensor([1, 1]))
        next_logits(model, cache, [1, 1])
        assert (cache.get_seq_length(), fork.get_seq_length()) == (16, 14)
        torch.testing.assert_close(next_logits(model, fork, [0, 1]), expected, atol=1e-4, rtol=1e-4)


def test_reset_starts_over_with_any_batch(under_each: Attach) -> None:
    model = tiny_model("llama")
    expected = whole_logits(model, [1])
    with under_each(model) as handle:
        cache = fed(model, handle)
        cache.reset()
        assert (cache.get_seq_length(), cache.is_initialized) == (0, False)
        model(left_padded([9, 9, 9])["input_ids"], past_key_values=cache)
        cache.reset()
        kept = PROMPT["input_ids"][1:, -9:]
        model(kept, past_key_values=cache)
        with torch.no_grad():
            logits = model(NEXT[1:], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_what_transformers_reads_from_a_cache(attached: Attach) -> None:
    model = tiny_model("gemma3")
    with attached(model) as handle:
        cache = handle.new_cache()
        assert isinstance(cache, Cache)
        assert (cache.is_compileable, cache.is_sliding, cache.get_max_length()) == (False, [True, False], -1)
        assert all(layer.is_croppable for layer in cache.layers)
        assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized, cache.input_ids.shape) == (
            0,
            -1,
            False,
            (0, 0),
        )
        model(**PROMPT, past_key_values=cache)
        assert (cache.get_seq_length(1), cache.batch_size, cache.is_initialized) == (14, 2, True)
        assert (cache.get_mask_sizes(3, 0), cache.get_mask_sizes(3, 1)) == ((17, 0), (17, 0))
        assert torch.equal(cache.input_ids, PROMPT["input_ids"])


def test_a_closed_cache_is_refused(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = fed(model, handle)
        cache.close()
        cache.close()
        assert handle.report().to_dict()["columns"] == 14
        for call in (model.generate, model):
            with pytest.raises(SessionStateError, match="this cache is closed"):
                call(**PROMPT, past_key_values=cache)


def test_rows_of_an_empty_cache_can_be_named_but_mean_nothing(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = handle.new_cache()
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([0]))
        cache.crop(0)
        model(**PROMPT, past_key_values=cache)
        assert cache.session.rows == 2


def test_long_histories_keep_ids_in_order(attached: Attach) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    ids = left_padded([300, 300])["input_ids"]
    with attached(model) as handle, torch.no_grad():
        cache = handle.new_cache()
        for start in (0, 100, 101, 250):
            stop = {0: 100, 100: 101, 101: 250, 250: 300}[start]
            model(ids[:, start:stop], past_key_values=cache)
        assert torch.equal(cache.input_ids, ids)
        model.model(inputs_embeds=model.get_input_embeddings()(ids[:, :1]), past_key_values=cache)
        assert cache.input_ids is None
