"""Stored keys and values are found by the very same model, dtype, adapter, RoPE and tenant, and by no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import kvtier
from kvtier.core.report import PrefixReport
from kvtier.core.store import Store
from kvtier.errors import ConfigError, KVTierError
from kvtier.testing.tiny_models import left_padded, tiny_model

TIERS: dict[str, Any] = {
    "tiers": [{"name": "host", "backend": "host", "capacity": "64MiB"}],
    "page_tokens": 4,
    "block_tokens": 8,
    "chunk_tokens": 16,
}
PROMPT = left_padded([100])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture
def store() -> Iterator[Store]:
    with kvtier.open_store(TIERS) as opened:
        yield opened


def run(model: Any, store: Store, **options: Any) -> PrefixReport:
    """Generate once; what the store did."""
    with kvtier.patch(model, "full", store=store, **options) as handle:
        model.generate(**PROMPT, **GREEDY)
        store.flush()
        report: PrefixReport = handle.report().prefix  # type: ignore[attr-defined]
        return report


def with_changed_weight() -> Any:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 0.01
    return model


OTHERS: dict[str, Callable[[], Any]] = {
    "weights": lambda: tiny_model("llama", seed=1),
    "one_weight": with_changed_weight,
    "dtype": lambda: tiny_model("llama", dtype=torch.bfloat16),
    "rope_theta": lambda: tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
    "rope_kind": lambda: tiny_model(
        "llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "window": lambda: tiny_model("mistral"),
    "family": lambda: tiny_model("qwen3"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_finds_nothing(other: str, store: Store) -> None:
    run(tiny_model("llama"), store)
    assert run(OTHERS[other](), store).tokens_matched == 0
    assert run(tiny_model("llama"), store).tokens_matched == 96


def test_a_model_of_another_window_finds_nothing(store: Store) -> None:
    run(tiny_model("mistral"), store)
    assert run(tiny_model("mistral", sliding_window=12), store).tokens_matched == 0


def test_another_tenant_finds_nothing(store: Store) -> None:
    model = tiny_model("llama")
    run(model, store, tenant="team-a")
    assert run(model, store, tenant="team-b").tokens_matched == 0
    assert run(model, store).tokens_matched == 0
    assert run(model, store, tenant="team-a").tokens_matched == 96
    assert store.stats().tenants.keys() == {"team-a", "team-b", "default"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for an old name
def test_each_adapter_has_prefixes_of_its_own_although_one_handle_serves_them(store: Store) -> None:
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    model.add_adapter("second", config)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model.generate(**PROMPT, **GREEDY)
    matched = []
    with kvtier.patch(model, "full", store=store) as handle:
        for name in ("default", "second", "default", "second"):
            model.set_adapter(name)
            assert torch.equal(model.generate(**PROMPT, **GREEDY), expected[name])
            store.flush()
            matched.append(handle.report().prefix.tokens_matched)  # type: ignore[attr-defined]
    assert matched == [0, 0, 96, 96]
    assert not torch.equal(expected["default"], expected["second"])


def test_a_cache_that_outlives_a_change_of_the_model_publishes_no_more(store: Store) -> None:
    model = tiny_model("llama")
    with kvtier.patch(model, "full", store=store) as handle:
        cache = handle.new_cache()
        first = model.generate(**PROMPT, **GREEDY, past_key_values=cache)
        store.flush()
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        longer = torch.cat([first, left_padded([40], seed=2)["input_ids"]], dim=1)
        model.generate(longer, attention_mask=torch.ones_like(longer), **GREEDY, past_key_values=cache)
        store.flush()
        report = handle.report().prefix  # type: ignore[attr-defined]
    assert "model has changed" in report.reason
    assert store.stats().records == 6


def test_a_cache_that_is_fed_by_hand_publishes_no_more(store: Store) -> None:
    model = tiny_model("llama")
    with kvtier.patch(model, "full", store=store) as handle, torch.no_grad():
        cache = handle.new_cache()
        model.generate(**PROMPT, **GREEDY, past_key_values=cache)
        model(left_padded([40], seed=2)["input_ids"], past_key_values=cache)
        store.flush()
        assert "outside of generate" in handle.report().prefix.reason  # type: ignore[attr-defined]
    assert store.stats().records == 6


UNSERVED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "embeddings": (
        lambda model: {"inputs_embeds": model.get_input_embeddings()(PROMPT["input_ids"])},
        "came as embeddings",
    ),
    "positions": (
        lambda model: {**PROMPT, "position_ids": 2 * torch.arange(100)[None]},
        "position_ids beside token ids",
    ),
    "padding_without_a_mask": (
        lambda model: {"input_ids": left_padded([100, 80])["input_ids"]},
        "padding tokens without an attention_mask",
    ),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_does_not_follow_from_token_ids_is_neither_matched_nor_published(case: str, store: Store) -> None:
    arguments, reason = UNSERVED[case]
    model = tiny_model("llama", max_position_embeddings=512)
    with kvtier.patch(model, "full", store=store) as handle:
        model.generate(**arguments(model), **GREEDY)
        store.flush()
        report = handle.report().prefix  # type: ignore[attr-defined]
    assert reason in report.reason
    assert (report.tokens_matched, report.chunks_published) == (0, 0)
    assert store.stats().records == store.stats().matches == 0


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 1.0,
            },
        ),
    ],
)
def test_keys_that_depend_on_the_whole_length_are_not_stored(family: str, rope: dict[str, Any], store: Store) -> None:
    model = tiny_model(family, rope_parameters=rope)
    report = run(model, store)
    assert "depend on the length of the whole sequence" in report.reason
    assert store.stats().records == 0


def test_ids_alone_without_a_mask_are_served(store: Store) -> None:
    model, ids = tiny_model("llama"), PROMPT["input_ids"]
    with kvtier.patch(model, "full", store=store) as handle:
        for arguments in ((ids,), (ids,)):
            model.generate(*arguments, **GREEDY)
            store.flush()
        assert handle.report().prefix.tokens_saved == 96  # type: ignore[attr-defined]


def test_chunks_of_another_size_are_not_mistaken() -> None:
    model = tiny_model("llama")
    expected = model.generate(**PROMPT, **GREEDY)
    with kvtier.open_store({**TIERS, "chunk_tokens": 32}) as store:
        for _ in range(2):
            with kvtier.patch(model, "full", store=store) as handle:
                assert torch.equal(model.generate(**PROMPT, **GREEDY), expected)
                assert handle.memory.layout.chunk_tokens == 32
                store.flush()
        assert handle.report().prefix.tokens_saved == 96  # type: ignore[attr-defined]


def test_a_store_that_does_not_fit_is_refused_when_patching(store: Store) -> None:
    from kvtier.core.memory import Memory
    from kvtier.integrations.hf.layout import layout_of
    from kvtier.integrations.hf.prefix import PrefixCache

    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="tenant must be"):
        kvtier.patch(model, "full", store=store, tenant="t" * 65)
    layout = layout_of(model, page_tokens=4, block_tokens=8)
    memory = Memory(layout, kvtier.Full(), kvtier.Budgets(), kvtier.StoreConfig())
    with pytest.raises(ConfigError, match="must agree on chunk_tokens, got 256 and 16"):
        PrefixCache(model, memory, store, "default")
    memory.close()
    assert run(model, store).reason == "", "the model was left as it was"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for an old name
def test_adapters_chosen_row_by_row_are_neither_matched_nor_published(store: Store) -> None:
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config).eval()
    model.add_adapter("second", config)
    rows = left_padded([90, 70])
    expected = model.generate(**rows, **GREEDY, adapter_names=["default", "second"])
    with kvtier.patch(model, "full", store=store) as handle:
        model.generate(**rows, **GREEDY)
        store.flush()
        stored = store.stats().records
        got = model.generate(**rows, **GREEDY, adapter_names=["default", "second"])
        store.flush()
        report = handle.report().prefix  # type: ignore[attr-defined]
    assert torch.equal(got, expected)
    assert (report.reason, report.tokens_matched) == ("each row has an adapter of its own", 0)
    assert store.stats().records == stored


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for an old name
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_a_prompt_behind_virtual_tokens_is_not_looked_up(store: Store) -> None:
    base = tiny_model("llama")
    with kvtier.patch(base, "full", store=store):
        base.generate(**PROMPT, **GREEDY)
        store.flush()
    tuned = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with kvtier.patch(tuned, "full", store=store):
        matches = store.stats().matches
        with contextlib.suppress(KVTierError):
            tuned.generate(**PROMPT, **GREEDY)
        assert store.stats().matches == matches


def test_a_hooked_model_finds_nothing_of_the_bare_one(store: Store) -> None:
    model = tiny_model("llama")
    run(model, store)
    steer = model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
    expected = model.generate(**PROMPT, **GREEDY)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(model.generate(**PROMPT, **GREEDY), expected)
        assert handle.report().prefix.tokens_matched == 0  # type: ignore[attr-defined]
    steer.remove()
    assert run(model, store).tokens_matched == 96
