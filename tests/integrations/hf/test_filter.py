"""Prompt filters under ``generate``: what is run, what comes back, and what the first run leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import kvtier
from kvtier.errors import CapacityError, InputError, UnsupportedModelError
from kvtier.integrations.hf.patch import PatchHandle
from kvtier.policies.prompt.gemfilter import GemFilter
from kvtier.policies.prompt.surprisal import Surprisal
from kvtier.testing.tiny_models import left_padded, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
EDGES: dict[str, int] = {"prefix": 2, "suffix": 3}
FILTERS = [GemFilter(keep=12, layer=1, **EDGES), Surprisal(keep=12, **EDGES)]
# An end token that is said as soon as it may be.
ENDING: dict[str, Any] = {"eos_token_id": 7, "pad_token_id": 0, "sequence_bias": {(7,): 1e4}}
STORE = {"tiers": [{"name": "host", "backend": "host", "capacity": "32MiB"}], "page_tokens": 4, "block_tokens": 8}

by_filter = pytest.mark.parametrize("policy", FILTERS, ids=lambda policy: policy.name)


def votes_of(handle: PatchHandle, prompt: dict[str, torch.Tensor]) -> list[list[float]]:
    """The votes of a generation, row by row."""
    cache = handle.new_cache()
    handle.model.generate(**prompt, **GREEDY, past_key_values=cache)
    assert cache.state.filtered is not None
    return [votes.tolist() for votes in cache.state.filtered.votes]


def seen_by_stock(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """q.k of the last query with every key of a layer, over all query heads, as stock attention sees them."""
    seen: list[torch.Tensor] = []

    def spy(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        if module.layer_idx == layer:
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            seen.append((query[:, :, -1:].double() * keys.double()).sum(dim=(1, 3))[0])
        return eager_attention_forward(module, query, key, *rest, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("spy")
    try:
        with torch.no_grad():
            model(ids)
    finally:
        model.set_attn_implementation(before)
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2_moe"])
@pytest.mark.parametrize("device", [None, "64KiB"], ids=["one_forward", "cut_and_spilled"])
def test_the_last_query_votes_as_stock_attention_sees_it(family: str, dtype: torch.dtype, device: str | None) -> None:
    model = tiny_model(family, dtype=dtype)
    prompt = left_padded([61, 40])
    layer = 1 if family == "llama" else 0
    policy = GemFilter(keep=8, layer=layer)
    if kvtier.KVLayout.of(model).layers[layer].window is not None:
        layer = 1 - layer
        policy = GemFilter(keep=8, layer=layer)

    expected = [seen_by_stock(model, row[real.bool()][None], layer) for row, real in zip(*prompt.values(), strict=True)]
    with kvtier.patch(model, policy, device=device, store=STORE) as handle:
        votes = votes_of(handle, prompt)

    for got, right in zip(votes, expected, strict=True):
        size = right.abs().max().item()
        slack = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype] * size
        assert torch.tensor(got).double() == pytest.approx(right, abs=slack)


@pytest.mark.parametrize("width", [None, 8], ids=["one_forward", "cut"])
def test_surprisal_is_what_stock_logits_say(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    prompt = left_padded([30, 21])
    if width is not None:
        monkeypatch.setattr("kvtier.integrations.hf.probe._LOGITS_BYTES", 4 * 2 * model.config.vocab_size * width)
    with kvtier.patch(model, Surprisal(keep=8, **EDGES), store=STORE) as handle:
        votes = votes_of(handle, prompt)
    for row, (ids, real) in enumerate(zip(*prompt.values(), strict=True)):
        own = ids[real.bool()]
        with torch.no_grad():
            logs = model(own[None]).logits[0].double().log_softmax(-1)
        nats = -logs[:-1].gather(1, own[1:, None])[:, 0]
        assert torch.tensor(votes[row][1:]).double() == pytest.approx(nats, abs=1e-4)
        assert votes[row][0] == max(votes[row][1:]), "nothing predicts the first token"


@by_filter
def test_the_tokens_that_are_left_are_run_as_a_prompt_of_their_own(policy: Any) -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])["input_ids"]
    with kvtier.patch(model, policy) as handle:
        cache = handle.new_cache()
        out = model.generate(prompt, **GREEDY, past_key_values=cache)
        (kept,) = cache.state.filtered.kept
        report = handle.report()
    run = prompt[:, kept]

    assert out[:, :40].tolist() == prompt.tolist()
    assert out[:, 40:].tolist() == model.generate(run, **GREEDY)[:, 12:].tolist()
    assert (len(kept), kept[:2].tolist(), kept[-3:].tolist()) == (12, [0, 1], [37, 38, 39])
    assert (report.policy, report.lossless, report.tokens) == (f"{policy.name} | full", False, 15)
    assert (report.prompt.tokens_prompt, report.prompt.tokens_run) == (40, 12)


@by_filter
def test_rows_of_a_batch_are_filtered_apart(policy: Any) -> None:
    model = tiny_model("llama")
    prompt = left_padded([40, 9, 25])
    with kvtier.patch(model, policy):
        out = model.generate(**prompt, **GREEDY)
        alone = [
            model.generate(ids[real.bool()][None], **GREEDY)[0, -4:].tolist()
            for ids, real in zip(*prompt.values(), strict=True)
        ]

    assert out[:, :40].tolist() == prompt["input_ids"].tolist()
    assert out[:, 40:].tolist() == alone


def test_no_layer_behind_the_votes_runs_and_nothing_stays() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    prompt = left_padded([40])["input_ids"]
    ran: list[tuple[int, int]] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, given, index=index: ran.append((index, given[0].shape[1])))
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)) as handle:
        model.generate(prompt, do_sample=False, max_new_tokens=1)
        (ledger,) = handle.memory.ledgers.values()
        assert ledger.in_use == 0

    assert ran == [(0, 40), (1, 40), (0, 12), (1, 12), (2, 12), (3, 12)]


def test_the_first_run_stays_within_the_device_budget() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    prompt = left_padded([200])["input_ids"]
    with kvtier.patch(model, GemFilter(keep=24, layer=3, **EDGES)) as handle:
        free = model.generate(prompt, **GREEDY)
    with kvtier.patch(model, GemFilter(keep=24, layer=3, **EDGES), device="48KiB", store=STORE) as handle:
        bounded = model.generate(prompt, **GREEDY)
        tiers = handle.report().bytes

    assert bounded.tolist() == free.tolist()
    assert tiers["device"].peak <= 48 << 10
    assert tiers["host"].peak > 0


@by_filter
def test_a_prompt_within_the_budget_is_run_as_it_is(policy: Any) -> None:
    model = tiny_model("llama")
    prompt = left_padded([12, 7])
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    stock = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    forwards.clear()
    with kvtier.patch(model, policy):
        out = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)

    assert out.sequences.tolist() == stock.sequences.tolist()
    assert torch.stack(out.logits) == pytest.approx(torch.stack(stock.logits), abs=1e-4)
    assert len(forwards) == 4, "no votes are needed"


@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({"max_length": 46}, 6),
        ({"max_length": 46, "max_new_tokens": 3}, 3),
        ({"max_new_tokens": 6, "min_new_tokens": 6}, 6),
        ({"max_length": 50, "min_length": 45, **ENDING}, 6),
        ({"max_length": 50, "min_length": 12, **ENDING}, 1),
        ({"max_length": 50, "min_length": 12, "min_new_tokens": 3, **ENDING}, 4),
    ],
)
def test_lengths_count_the_prompt_that_was_given(options: dict[str, Any], new: int) -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)):
        assert model.generate(**prompt, do_sample=False, **options).shape[1] == 40 + new


def test_streamers_hear_the_prompt_that_was_given_once() -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.heard.append(value.flatten().tolist())

        def end(self) -> None:
            self.heard.append([])

    model = tiny_model("llama")
    prompt = left_padded([40])["input_ids"]
    listener = Listener()
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)):
        out = model.generate(prompt, **GREEDY, streamer=listener)

    assert listener.heard == [prompt[0].tolist(), *([int(token)] for token in out[0, 40:]), []]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
def test_several_sequences_come_back_with_the_prompt_each(options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    prompt = left_padded([40, 20])
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)):
        out = model.generate(**prompt, **{**GREEDY, **options}, return_dict_in_generate=True)

    times = options["num_return_sequences"]
    assert out.sequences.shape == (2 * times, 44)
    assert out.sequences[:, :40].tolist() == prompt["input_ids"].repeat_interleave(times, dim=0).tolist()


def test_without_a_cache_the_same_tokens_are_run() -> None:
    model = tiny_model("llama")
    prompt = left_padded([40, 20])
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)):
        cached = model.generate(**prompt, **GREEDY)
        assert model.generate(**prompt, **GREEDY, use_cache=False).tolist() == cached.tolist()


@pytest.mark.parametrize("form", ["all", "all_masked", "new_masked"])
def test_later_turns_are_run_whole_behind_what_is_left_of_the_first(form: str) -> None:
    model = tiny_model("llama")
    prompt, more = left_padded([40, 23]), torch.randint(3, 60, (2, 5))
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)) as handle:
        cache = handle.new_cache()
        first = model.generate(**prompt, **GREEDY, past_key_values=cache)
        turn = torch.cat([first, more], dim=1)
        mask = torch.cat([prompt["attention_mask"], torch.ones(2, 9, dtype=torch.long)], dim=1)
        assert cache.input_ids.tolist() == first[:, :-1].tolist()
        twin = copy.deepcopy(cache)
        given: dict[str, Any] = {
            "all": {"input_ids": turn},
            "all_masked": {"input_ids": turn, "attention_mask": mask},
            "new_masked": {"input_ids": turn[:, 43:], "attention_mask": mask},
        }[form]
        kept = cache.state.filtered.kept
        second = model.generate(**given, **GREEDY, past_key_values=cache)
        assert model.generate(**given, **GREEDY, past_key_values=twin).tolist() == second.tolist()
    for row in range(2):
        own = prompt["input_ids"][row][prompt["attention_mask"][row].bool()][kept[row]]
        stock = model.generate(torch.cat([own, turn[row, 40:]])[None], **GREEDY)
        assert second[row, -4:].tolist() == stock[0, -4:].tolist()
    assert second[:, :-4].tolist() == (turn[:, 43:] if form == "new_masked" else turn).tolist()


def test_a_turn_must_begin_with_the_prompt_that_was_filtered() -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])["input_ids"]
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)) as handle:
        cache = handle.new_cache()
        out = model.generate(prompt, **GREEDY, past_key_values=cache)
        for wrong in (out[:, 1:], torch.cat([out[:, :1] + 1, out[:, 1:]], dim=1), out[:, :20]):
            with pytest.raises(InputError, match="do not begin with it"):
                model.generate(wrong, **GREEDY, past_key_values=cache)
        with pytest.raises(InputError, match="must cover the 40 columns"):
            model.generate(out, attention_mask=torch.ones(1, 20), **GREEDY, past_key_values=cache)
        assert model.generate(out, **GREEDY, past_key_values=cache).shape[1] == 48


@pytest.mark.parametrize("drafts", ["prompt_lookup", "assistant"])
def test_drafts_change_nothing(drafts: str) -> None:
    model = tiny_model("llama")
    prompt = left_padded([12])["input_ids"].repeat(1, 4)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if drafts == "assistant":
        options = {"assistant_model": tiny_model("llama", seed=3)}
    with kvtier.patch(model, GemFilter(keep=24, **EDGES)):
        plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        drafted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY, **options)

    assert drafted.tolist() == plain.tolist()


def test_a_store_keeps_what_was_run() -> None:
    model = tiny_model("llama")
    prompt = left_padded([90])["input_ids"]
    with kvtier.open_store({**STORE, "chunk_tokens": 16}) as store:
        said = []
        for _ in range(2):
            with kvtier.patch(model, GemFilter(keep=50, **EDGES), store=store) as handle:
                said.append(model.generate(prompt, **GREEDY).tolist())
                store.flush()
                prefix = handle.report().prefix
        with kvtier.patch(model, "full", store=store) as handle:
            whole = model.generate(prompt, **GREEDY)
            assert handle.report().prefix.tokens_matched == 0, "what a filter left is another prompt"

    assert said[0] == said[1]
    assert prefix.tokens_saved == 48
    assert whole[:, :90].tolist() == prompt.tolist()


def test_a_filtered_cache_is_rebuilt_and_goes_on() -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])["input_ids"]
    with kvtier.patch(model, GemFilter(keep=12, **EDGES)) as handle:
        cache, other = handle.new_cache(), handle.new_cache()
        first = model.generate(prompt, **GREEDY, past_key_values=cache)
        model.generate(prompt, **GREEDY, past_key_values=other)
        expected = model.generate(first, **GREEDY, past_key_values=other)
        handle.recover(cache)
        assert cache.input_ids.tolist() == first[:, :-1].tolist()
        assert model.generate(first, **GREEDY, past_key_values=cache).tolist() == expected.tolist()
        cache.reset()
        assert cache.state.filtered is None
        assert model.generate(prompt, **GREEDY, past_key_values=cache).tolist() == first.tolist()


@by_filter
def test_what_has_no_token_ids_of_its_own_is_refused(policy: Any) -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])
    with kvtier.patch(model, policy):
        with pytest.raises(InputError, match="as embeddings"):
            model.generate(inputs_embeds=torch.zeros(1, 40, model.config.hidden_size), **GREEDY)
        with pytest.raises(InputError, match="position_ids beside token ids"):
            model.generate(**prompt, position_ids=torch.arange(40)[None], **GREEDY)
        with pytest.raises(UnsupportedModelError, match="patch the assistant with 'full'"):
            model.generate(**prompt, **GREEDY, is_assistant=True)


def test_layers_that_cannot_be_stopped_are_told_of() -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])["input_ids"]
    model.model.layers[1].forward = lambda hidden_states, *_, **__: hidden_states
    with (
        kvtier.patch(model, GemFilter(keep=12, layer=1, **EDGES)),
        pytest.raises(UnsupportedModelError, match="ended without kvtier's attention in layer 1"),
    ):
        model.generate(prompt, **GREEDY)


def test_a_first_run_that_fails_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    prompt = left_padded([200])["input_ids"]
    store = {**STORE, "tiers": [{"name": "host", "backend": "host", "capacity": "4KiB"}]}
    with kvtier.patch(model, GemFilter(keep=12, layer=1, **EDGES), device="24KiB", store=store) as handle:
        with pytest.raises(CapacityError):
            model.generate(prompt, **GREEDY)
        (ledger,) = handle.memory.ledgers.values()
        assert ledger.in_use == 0
        assert model.generate(prompt[:, :12], **GREEDY).shape == (1, 16)


def test_a_filter_goes_before_eviction_and_retrieval() -> None:
    model = tiny_model("llama")
    prompt = left_padded([120])["input_ids"]
    words = "gemfilter(keep=80, prefix=2, suffix=3) | snapkv(keep=40, window=4) | quest(read=16, dense_layers=0)"
    with kvtier.patch(model, words, store=STORE) as handle:
        out = model.generate(prompt, **GREEDY)
        report = handle.report()

    assert out.shape == (1, 124)
    assert report.policy == "gemfilter | snapkv | quest"
    assert (report.prompt.tokens_run, report.tokens) == (80, 83)
    assert report.kept <= 40 + 3
    assert 0 < report.pages_read < report.pages_held
