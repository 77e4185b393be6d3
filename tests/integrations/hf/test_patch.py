"""Patching and unpatching: what changes, what comes back, and what two patches do to each other."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, LlamaModel

import kvtier
from kvtier.errors import ConfigError, SessionStateError, UnsupportedModelError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.layout import layout_of
from kvtier.integrations.hf.patch import PatchHandle, attach
from kvtier.testing.oracles import PlainMemory
from kvtier.testing.tiny_models import left_padded, tiny_model

Attach = Callable[..., PatchHandle]

PROMPT = left_padded([20, 11])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    return {
        "config": copy.deepcopy(model.config.__dict__),
        "attributes": set(model.__dict__),
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "generate": model.generate.__func__,
        "logits": model(**PROMPT).logits,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    logits = torch.equal(before.pop("logits"), after.pop("logits"))
    assert after == before
    assert logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_leaving_the_context_restores_the_model_exactly(attached: Attach, implementation: str) -> None:
    model = tiny_model("gemma3", attn_implementation=implementation)
    before = snapshot(model)
    with attached(model):
        assert compat.implementation(model.config) == "kvtier"
        model.generate(**PROMPT, **GREEDY)
    assert_same(before, snapshot(model))


def test_an_exception_inside_the_context_restores_the_model(attached: Attach) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), attached(model):
        raise ZeroDivisionError
    assert_same(before, snapshot(model))


def test_a_patch_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    monkeypatch.setattr(model, "register_forward_pre_hook", None)
    memory = PlainMemory(layout_of(model))
    with pytest.raises(TypeError):
        attach(model, memory)
    monkeypatch.undo()
    assert_same(before, snapshot(model))


def test_the_handle_works_without_a_context(attached: Attach) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    handle = attached(model)
    assert handle.model is model
    model.generate(**PROMPT, **GREEDY)
    handle.remove()
    handle.remove()
    assert_same(before, snapshot(model))
    with pytest.raises(SessionStateError, match="patch the model again"):
        handle.new_cache()
    with pytest.raises(SessionStateError, match="patch the model again"), handle:
        pass


def test_an_earlier_replacement_of_generate_comes_back(attached: Attach) -> None:
    model = tiny_model("llama")
    original = model.generate

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.generate = wrapped
    stock = model.generate(**PROMPT, **GREEDY)
    with attached(model):
        assert model.generate(**PROMPT, **GREEDY).tolist() == stock.tolist()
    assert model.generate is wrapped


def test_a_patched_model_is_not_patched_twice(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model):
        with pytest.raises(SessionStateError, match="patched already"):
            attached(model)
        model.generate(**PROMPT, **GREEDY)
    with attached(model):
        model.generate(**PROMPT, **GREEDY)


def test_two_patched_models_do_not_meet(attached: Attach) -> None:
    first, second = tiny_model("llama"), tiny_model("mistral", seed=1)
    stock = [model.generate(**PROMPT, **GREEDY).tolist() for model in (first, second)]
    with attached(first):
        with attached(second):
            assert [model.generate(**PROMPT, **GREEDY).tolist() for model in (first, second)] == stock
        assert [model.generate(**PROMPT, **GREEDY).tolist() for model in (first, second)] == stock


def test_a_model_that_shares_the_config_is_refused_not_corrupted(attached: Attach) -> None:
    model = tiny_model("llama")
    twin = type(model)(model.config).eval()
    stock = twin.generate(**PROMPT, **GREEDY)
    with attached(model):
        with pytest.raises(UnsupportedModelError, match="shares its config"):
            twin.generate(**PROMPT, **GREEDY)
        with pytest.raises(SessionStateError, match="shares its config"):
            attached(twin)
    assert twin.generate(**PROMPT, **GREEDY).tolist() == stock.tolist()


def test_a_copy_of_a_patched_model_is_refused_not_corrupted(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model):
        twin = copy.deepcopy(model)
        with pytest.raises(UnsupportedModelError, match="is a copy of one"):
            twin.generate(**PROMPT, **GREEDY)


def test_threads_generate_independently_with_one_model(under_each: Attach) -> None:
    model = tiny_model("mistral")
    prompts = [left_padded([10 + 3 * thread, 7], seed=thread) for thread in range(4)]
    stock = [model.generate(**prompt, **GREEDY).tolist() for prompt in prompts]
    results: dict[int, Any] = {}

    def run(thread: int) -> None:
        results[thread] = [model.generate(**prompts[thread], **GREEDY).tolist() for _ in range(3)]

    with under_each(model):
        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {thread: [stock[thread]] * 3 for thread in range(4)}


def test_caches_of_our_own_are_closed_and_reported(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        with pytest.raises(SessionStateError, match="nothing to report"):
            handle.report()
        model.generate(**PROMPT, **GREEDY)
        [session] = handle.memory.sessions
        with pytest.raises(SessionStateError, match="closed"):
            session.reorder([0])
        assert handle.report().to_dict() == {"rows": 2, "columns": 27, "kv_bytes": 2 * (20 + 11 + 14) * 256}


def test_a_cache_that_is_handed_out_stays_open(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        output = model.generate(**PROMPT, **GREEDY, return_dict_in_generate=True)
        assert output.past_key_values.get_seq_length() == 27
        assert handle.report().to_dict()["columns"] == 27
        session = output.past_key_values.session
        del output
        gc.collect()
        handle.new_cache()
        with pytest.raises(SessionStateError, match="closed"):
            session.reorder([0])


def test_a_failed_generation_frees_its_cache(attached: Attach) -> None:
    model = tiny_model("llama")

    def fail(*args: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with attached(model) as handle:
        with pytest.raises(ZeroDivisionError):
            model.generate(**PROMPT, **GREEDY, logits_processor=[fail])
        with pytest.raises(SessionStateError, match="closed"):
            handle.memory.sessions[0].reorder([0])


def test_removing_closes_every_cache(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = handle.new_cache()
        model.generate(**PROMPT, **GREEDY, past_key_values=cache)
        fork = copy.deepcopy(cache)
    for closed in (cache, fork):
        with pytest.raises(SessionStateError, match="closed"):
            model(left_padded([1])["input_ids"].expand(2, 1), past_key_values=closed)


def test_nothing_keeps_an_unpatched_model_alive(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model):
        model.generate(**PROMPT, **GREEDY)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_base_model_without_generate(attached: Attach) -> None:
    model = LlamaModel(tiny_model("llama").config).eval()
    stock = model(**PROMPT).last_hidden_state
    with attached(model) as handle:
        output = model(**PROMPT)
        assert output.past_key_values.memory is handle.memory
        real = PROMPT["attention_mask"].bool()
        torch.testing.assert_close(output.last_hidden_state[real], stock[real])


def test_the_public_patch_runs_the_paged_core() -> None:
    model = tiny_model("llama")
    stock = model.generate(**PROMPT, **GREEDY)
    store = {"tiers": [{"name": "host", "backend": "host", "capacity": "16MiB"}], "page_tokens": 4, "block_tokens": 8}
    with kvtier.patch(model, "full", device="1MiB", store=store, tenant="team-a") as handle:
        assert model.generate(**PROMPT, **GREEDY).tolist() == stock.tolist()
        report = handle.report().to_dict()
    assert (report["policy"], report["tenant"], report["tokens"]) == ("full", "team-a", 27)
    assert report["bytes"]["device"]["capacity"] == 2**20


def test_a_wrong_policy_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ConfigError):
        kvtier.patch(model, "fulll")
    assert_same(before, snapshot(model))


def test_registering_touches_no_other_implementation() -> None:
    compat.register(len, len)
    with_ours = AttentionInterface()
    assert with_ours["kvtier"] is len
    assert {"sdpa", "flex_attention"} <= set(with_ours)
