"""A prompt that the store knows is loaded instead of computed, and the tokens are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvtier
from kvtier.core.report import PrefixReport
from kvtier.core.store import Store
from kvtier.integrations.hf.patch import PatchHandle
from kvtier.testing.tiny_models import FAMILIES, left_padded, tiny_model

LISTED = ["llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "gpt_oss"]
CHUNK = 16
TIERS: dict[str, Any] = {
    "tiers": [{"name": "host", "backend": "host", "capacity": "64MiB"}],
    "page_tokens": 4,
    "block_tokens": 8,
    "chunk_tokens": CHUNK,
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
LENGTHS = (100, 77)

Mode = Callable[[Any, PatchHandle | None], torch.Tensor]


@pytest.fixture
def store() -> Iterator[Store]:
    with kvtier.open_store(TIERS) as opened:
        yield opened


def prefix_of(handle: PatchHandle) -> PrefixReport:
    """What the last generate did with the store, after all that it published has arrived."""
    assert handle.store is not None
    handle.store.flush()
    prefix: PrefixReport = handle.report().prefix  # type: ignore[attr-defined]
    assert prefix.chunks_waiting == 0
    return prefix


def batch(model: Any, handle: PatchHandle | None) -> torch.Tensor:
    return model.generate(**left_padded(LENGTHS), **GREEDY)


def equal_rows(model: Any, handle: PatchHandle | None) -> torch.Tensor:
    row = left_padded(LENGTHS[:1])["input_ids"]
    return model.generate(row.repeat(3, 1), attention_mask=torch.ones(3, LENGTHS[0], dtype=torch.long), **GREEDY)


def beams(model: Any, handle: PatchHandle | None) -> torch.Tensor:
    return model.generate(**left_padded(LENGTHS), **GREEDY, num_beams=3, num_return_sequences=2)


def in_chunks(model: Any, handle: PatchHandle | None) -> torch.Tensor:
    return model.generate(**left_padded(LENGTHS), **GREEDY, prefill_chunk_size=23)


def drafts(model: Any, handle: PatchHandle | None) -> torch.Tensor:
    ids = left_padded((40,))["input_ids"].repeat(1, 2)
    return model.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3, **GREEDY)


def two_turns(model: Any, handle: PatchHandle | None) -> torch.Tensor:
    cache = None if handle is None else handle.new_cache()
    first = model.generate(**left_padded(LENGTHS[:1]), **{**GREEDY, "max_new_tokens": 30}, past_key_values=cache)
    longer = torch.cat([first, left_padded([21], seed=1)["input_ids"]], dim=1)
    return model.generate(longer, attention_mask=torch.ones_like(longer), **GREEDY, past_key_values=cache)


MODES: list[Mode] = [batch, equal_rows, beams, in_chunks, drafts, two_turns]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("family", LISTED)
def test_tokens_are_the_same_with_a_restored_prefix(family: str, mode: Mode, store: Store) -> None:
    model = tiny_model(family)
    expected = mode(model, None)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(mode(model, handle), expected)
        cold = prefix_of(handle)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(mode(model, handle), expected)
        warm = prefix_of(handle)

    assert cold.tokens_matched == cold.tokens_saved == cold.chunks_refused == warm.chunks_refused == 0
    assert cold.chunks_published > 0
    assert store.stats().short_loads == 0
    if mode is beams:
        assert cold.reason == warm.reason == "of several continuations of a prompt none is published"
    else:
        assert cold.reason == ""
    if mode is drafts:
        assert "assisted decoding" in warm.reason
        assert warm.tokens_saved == 0 < warm.tokens_matched
        return
    assert store.stats().loaded_tokens > 0
    if mode is not two_turns:
        assert warm.tokens_prompt == cold.tokens_prompt
        assert 0 < warm.tokens_prompt - warm.tokens_saved <= 2 * CHUNK * 2
        assert warm.tokens_saved <= warm.tokens_matched


POLICIES = {
    "full": {},
    "quest(dense_layers=0)": {"read": 24},
    "snapkv(window=8)": {"keep": 40},
    "adakv(window=8)": {"keep": 40},
    "snapkv(window=8) | quest(dense_layers=1)": {"keep": 60, "read": 24},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", [batch, beams, in_chunks, two_turns], ids=lambda mode: mode.__name__)
def test_a_policy_makes_of_a_restored_prefix_what_it_makes_of_a_computed_one(
    policy: str, mode: Mode, store: Store
) -> None:
    model = tiny_model("gemma3")
    with kvtier.patch(model, policy, store={**TIERS}, **POLICIES[policy]) as handle:
        expected = mode(model, handle)
        assert handle.store is None, "host memory alone outlives nothing"
    for _ in range(2):
        with kvtier.patch(model, policy, store=store, **POLICIES[policy]) as handle:
            assert torch.equal(mode(model, handle), expected)
            prefix_of(handle)
    assert store.stats().loaded_tokens >= 64


def test_one_policy_restores_what_another_published(store: Store) -> None:
    model = tiny_model("llama")
    with kvtier.patch(model, "snapkv(window=8)", keep=40, store=store) as handle:
        batch(model, handle)
        assert prefix_of(handle).chunks_published == 100 // CHUNK + 77 // CHUNK
        assert "lossy" in prefix_of(handle).reason, "what is generated from an evicted cache is not published"
    expected = batch(tiny_model("llama"), None)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(batch(model, handle), expected)
        assert prefix_of(handle).tokens_saved > 140


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_published_is_what_the_model_made(family: str, store: Store) -> None:
    model = tiny_model(family)
    with kvtier.patch(model, "full", store=store) as handle:
        cache = handle.new_cache()
        model.generate(**left_padded(LENGTHS), do_sample=False, max_new_tokens=60, past_key_values=cache)
        prefix_of(handle)
        ids, space = cache.input_ids, cache.state.trail.space  # type: ignore[union-attr]
    for row, pad in enumerate((0, LENGTHS[0] - LENGTHS[1])):
        tokens = ids[row, pad:]
        expected = all_keys(model, tokens[None])
        with space.match(tokens) as hit:
            assert hit.tokens == tokens.numel() // CHUNK * CHUNK > LENGTHS[row], "generated tokens are published, too"
            for index, chunk in enumerate(hit.load()):
                for layer, (keys, values) in enumerate(expected):
                    span = slice(index * CHUNK, (index + 1) * CHUNK)
                    torch.testing.assert_close(chunk.k[layer], keys[:, span], rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(chunk.v[layer], values[:, span], rtol=1e-4, atol=1e-4)


def all_keys(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V [Hk, T, D] of every layer, from a cache that forgets nothing."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def test_a_longer_prompt_goes_on_from_a_shorter_one_and_from_an_answer(store: Store) -> None:
    model, ids = tiny_model("qwen3"), left_padded([90])["input_ids"]
    with kvtier.patch(model, "full", store=store) as handle:
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=50)
        prefix_of(handle)
        question = torch.cat([answer, left_padded([7], seed=3)["input_ids"]], dim=1)
        got = model.generate(question, attention_mask=torch.ones_like(question), **GREEDY)
        warm = prefix_of(handle)
    assert warm.tokens_saved == 139 // CHUNK * CHUNK, "all but the last generated token went through the model"
    assert torch.equal(got, model.generate(question, attention_mask=torch.ones_like(question), **GREEDY))


def test_a_whole_prompt_that_is_stored_still_runs_its_last_tokens(store: Store) -> None:
    model, ids = tiny_model("llama"), left_padded([4 * CHUNK])["input_ids"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    for policy, options, leave in (("full", {}, 1), ("snapkv(window=8)", {"keep": 400}, 8)):
        with kvtier.patch(model, policy, store=store, **options) as handle:
            model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            prefix_of(handle)
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY), expected)
            assert prefix_of(handle).tokens_saved == 4 * CHUNK - leave


def test_rows_go_on_from_the_column_that_all_reach(store: Store) -> None:
    model, prompt = tiny_model("gpt_oss"), left_padded((96, 60, 33))
    expected = model.generate(**prompt, **GREEDY)
    with kvtier.patch(model, "full", store=store) as handle:
        for row, tokens in ((0, 96), (2, 33)):
            ids = prompt["input_ids"][row : row + 1, -tokens:]
            model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            prefix_of(handle)
        assert torch.equal(model.generate(**prompt, **GREEDY), expected)
        report = prefix_of(handle)
    assert report.tokens_matched == 96 + 0 + 32
    assert report.tokens_saved == 36, "row 1, of which nothing is stored, begins at column 36"


def test_the_device_budget_holds_while_a_prefix_comes_back() -> None:
    model = tiny_model("gemma3", max_position_embeddings=2048)
    prompt = left_padded((900, 700))
    expected = model.generate(**prompt, **GREEDY)
    tiers = {**TIERS, "tiers": [{"name": "host", "backend": "host", "capacity": "64MiB"}]}
    device = 420_000
    with kvtier.open_store(tiers) as store:
        for _ in range(2):
            with kvtier.patch(model, "full", store=store, device=device) as handle:
                assert torch.equal(model.generate(**prompt, **GREEDY), expected)
                report = handle.report().to_dict()
                prefix = prefix_of(handle)
            assert report["bytes"]["device"]["peak"] <= device
            assert report["bytes"]["host"]["peak"] > 0
        assert prefix.tokens_saved > 1500


def test_the_report_is_plain_and_times_the_first_token(store: Store) -> None:
    model = tiny_model("llama")
    with kvtier.patch(model, "full", store=store) as handle:
        batch(model, handle)
        prefix_of(handle)
        batch(model, handle)
        plain = json.loads(json.dumps(handle.report().to_dict()))
    prefix = plain["prefix"]
    assert prefix["tokens_prompt"] == sum(LENGTHS)
    assert prefix["first_token_s"] > prefix["restore_seconds"] >= prefix["load_seconds"] > 0
    assert plain["policy"] == "full"


@pytest.mark.parametrize(
    ("policy", "options", "arguments", "widths"),
    [
        ("full", {}, {}, [32, 32, 32, 4]),
        ("full", {}, {"prefill_chunk_size": 20}, [20] * 5),
        ("snapkv(window=8)", {"keep": 40}, {}, [100]),
        ("full", {}, {"position_ids": torch.arange(100)[None]}, [100]),
    ],
)
def test_a_prompt_is_cut_only_so_that_its_chunks_can_be_published(
    policy: str, options: dict[str, int], arguments: dict[str, Any], widths: list[int]
) -> None:
    model, seen = tiny_model("llama"), list[int]()
    chunk_bytes = CHUNK * 2 * 2 * 2 * 16 * 4
    with (
        kvtier.open_store({**TIERS, "publish_bytes": 4 * chunk_bytes}) as store,
        kvtier.patch(model, policy, store=store, **options),
    ):
        model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        model.generate(**left_padded([100]), **arguments, do_sample=False, max_new_tokens=1)
    assert seen == widths


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prefix_moves_between_devices(family: str, store: Store) -> None:
    model = tiny_model(family)
    prompt = left_padded(LENGTHS)
    on_cpu = model.generate(**prompt, **GREEDY)
    with kvtier.patch(model, "full", store=store) as handle:
        model.generate(**prompt, **GREEDY)
        prefix_of(handle)
    model.to("cuda")
    with kvtier.patch(model, "full", store=store, device="16MiB") as handle:
        got = model.generate(**{name: part.cuda() for name, part in prompt.items()}, **GREEDY)
        assert prefix_of(handle).tokens_saved > 140
    assert torch.equal(got.cpu(), on_cpu)


def test_without_a_store_nothing_is_reported() -> None:
    model = tiny_model("llama")
    with kvtier.patch(model, "full", store=TIERS) as handle:
        batch(model, handle)
        assert handle.report().to_dict()["prefix"] is None
