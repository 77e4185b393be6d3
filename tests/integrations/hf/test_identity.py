"""A patched model says, token by token, what the same model says unpatched."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvtier.integrations.hf.layout import layout_of
from kvtier.integrations.hf.patch import PatchHandle, attach
from kvtier.testing.oracles import PlainMemory
from kvtier.testing.tiny_models import left_padded, tiny_model

LISTED = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "gpt_oss"]
BEYOND = ["olmo2", "granite", "qwen2_moe"]
NEW_TOKENS = 10

Attach = Callable[..., PatchHandle]
NewCache = Callable[[], Any]
Mode = Callable[[Any, NewCache], torch.Tensor]


class Tokens(BaseStreamer):
    """Collects what is streamed."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.seen.append(-1)


def greedy(model: Any, lengths: tuple[int, ...] = (24,), **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**left_padded(lengths), do_sample=False, max_new_tokens=NEW_TOKENS, **options)
    return tokens


def several_turns(model: Any, new_cache: NewCache) -> torch.Tensor:
    cache, tokens = new_cache(), left_padded([13])["input_ids"]
    for turn in range(3):
        question = left_padded([5], seed=turn + 1)["input_ids"]
        tokens = torch.cat([tokens, question], dim=1)
        tokens = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=6,
        )
    return tokens


def sampling(model: Any, new_cache: NewCache) -> torch.Tensor:
    torch.manual_seed(7)
    tokens: torch.Tensor = model.generate(**left_padded([24, 15]), do_sample=True, top_k=20, max_new_tokens=NEW_TOKENS)
    return tokens


def returned_sequences(model: Any, new_cache: NewCache) -> torch.Tensor:
    torch.manual_seed(7)
    tokens: torch.Tensor = model.generate(
        **left_padded([24, 15]), do_sample=True, num_return_sequences=2, max_new_tokens=NEW_TOKENS
    )
    return tokens


def streamed(model: Any, new_cache: NewCache) -> torch.Tensor:
    streamer = Tokens()
    tokens = greedy(model, streamer=streamer)
    assert streamer.seen == [*tokens[0].tolist(), -1]
    return tokens


def prompt_lookup(model: Any, new_cache: NewCache) -> torch.Tensor:
    phrase = left_padded([6])["input_ids"]
    prompt = phrase.repeat(1, 4)
    tokens: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        prompt_lookup_num_tokens=4,
        do_sample=False,
        max_new_tokens=2 * NEW_TOKENS,
    )
    return tokens


MODES: dict[str, Mode] = {
    "plain": lambda model, _: greedy(model),
    "left_padding": lambda model, _: greedy(model, (24, 19, 3)),
    "beams": lambda model, _: greedy(model, (24, 15), num_beams=3),
    "several_turns": several_turns,
    "sampling": sampling,
    "return_sequences": returned_sequences,
    "streamer": streamed,
    "chunked_prefill": lambda model, _: greedy(model, (24, 19, 3), prefill_chunk_size=5),
    "no_cache": lambda model, _: greedy(model, (24, 15), use_cache=False),
    "prompt_lookup": prompt_lookup,
}


def both_ways(model: Any, mode: Mode, attach: Attach) -> tuple[torch.Tensor, torch.Tensor]:
    """What a mode gives without and with the patch."""
    stock = mode(model, lambda: DynamicCache(config=model.config))
    with attach(model) as handle:
        return stock, mode(model, handle.new_cache)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", LISTED)
def test_tokens_are_those_of_the_unpatched_model(family: str, mode: str, under_each: Attach) -> None:
    stock, patched = both_ways(tiny_model(family), MODES[mode], under_each)
    assert patched.tolist() == stock.tolist()


@pytest.mark.parametrize("family", BEYOND)
def test_families_outside_the_list_just_work(family: str, under_each: Attach) -> None:
    stock, patched = both_ways(tiny_model(family), MODES["left_padding"], under_each)
    assert patched.tolist() == stock.tolist()


@pytest.mark.parametrize("patch_assistant", [False, True], ids=["stock_assistant", "patched_assistant"])
@pytest.mark.parametrize("family", LISTED)
def test_assisted_generation(family: str, patch_assistant: bool, under_each: Attach) -> None:
    model, assistant = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn(assistant.lm_head.weight.shape, generator=torch.manual_seed(3)) * 0.1)
    stock = greedy(model)
    if not patch_assistant:
        try:
            greedy(model, assistant_model=assistant)
        except RuntimeError as error:
            pytest.skip(f"transformers {transformers.__version__} itself fails here: {error}")
    with under_each(model), under_each(assistant) if patch_assistant else nullcontext() as helper:
        assisted = greedy(model, assistant_model=assistant)
        assert helper is None or helper.report().to_dict()["rows"] == 1
    assert assisted.tolist() == stock.tolist()


def test_control_an_attention_that_forgets_one_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    stock = greedy(model)
    memory = PlainMemory(layout_of(model))
    with attach(model, memory) as handle:
        cache = handle.new_cache()
        attend = memory.sessions[0].attend

        def forget_first(layer: int, q: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
            return attend(layer, q, positions, **{**options, "window": 20})

        monkeypatch.setattr(memory.sessions[0], "attend", forget_first)
        forgetful = greedy(model, past_key_values=cache)
    assert forgetful.tolist() != stock.tolist()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for an old name
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_lora_adapters(family: str, under_each: Attach) -> None:
    model = get_peft_model(
        tiny_model(family), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.eval()
    stock, logits = greedy(model, (24, 15)), model(**left_padded([24])).logits
    with under_each(model):
        assert greedy(model, (24, 15)).tolist() == stock.tolist()
        torch.testing.assert_close(model(**left_padded([24])).logits, logits)
    assert torch.equal(model(**left_padded([24])).logits, logits)


def test_embedded_prompts(attached: Attach) -> None:
    model = tiny_model("qwen3")
    prompt = left_padded([24, 15])
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(prompt["input_ids"]),
        "attention_mask": prompt["attention_mask"],
    }
    stock = model.generate(**embeds, do_sample=False, max_new_tokens=NEW_TOKENS)
    with attached(model, max_prefill=7):
        assert model.generate(**embeds, do_sample=False, max_new_tokens=NEW_TOKENS).tolist() == stock.tolist()


def test_second_turn_of_a_padded_batch(under_each: Attach) -> None:
    model = tiny_model("llama")
    first, second = left_padded([12, 7]), left_padded([5, 5], seed=1)

    def turns(cache: Any) -> torch.Tensor:
        tokens = model.generate(**first, past_key_values=cache, do_sample=False, max_new_tokens=4)
        mask = torch.cat([first["attention_mask"], torch.ones(2, 4, dtype=torch.long), second["attention_mask"]], dim=1)
        tokens = torch.cat([tokens, second["input_ids"]], dim=1)
        result: torch.Tensor = model.generate(
            tokens, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=NEW_TOKENS
        )
        return result

    stock = turns(DynamicCache(config=model.config))
    with under_each(model) as handle:
        assert turns(handle.new_cache()).tolist() == stock.tolist()


@pytest.mark.parametrize("first_inside", [True, False], ids=["inside_then_outside", "outside_then_inside"])
def test_turns_inside_and_outside_inference_mode(first_inside: bool, under_each: Attach) -> None:
    model = tiny_model("gemma3")
    tokens = left_padded([12, 7])
    stock = model.generate(**tokens, do_sample=False, max_new_tokens=8)
    mask = torch.cat([tokens["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    with under_each(model) as handle:
        cache = handle.new_cache()
        with torch.inference_mode(first_inside):
            half = model.generate(**tokens, do_sample=False, max_new_tokens=4, past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.reorder_cache(torch.tensor([1, 0]))
        with torch.inference_mode(not first_inside):
            whole = model.generate(half, attention_mask=mask, do_sample=False, max_new_tokens=4, past_key_values=cache)
    assert whole.tolist() == stock.tolist()


@given(
    # Families that stock SDPA serves: the eager functions of the others take their softmax in fp32.
    family=st.sampled_from(["llama", "mistral", "gemma3", "qwen2_moe"]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    chunk=st.none() | st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_batch_in_any_chunks_in_fp64(
    under_each: Attach, family: str, lengths: list[int], chunk: int | None, seed: int
) -> None:
    model = tiny_model(family, dtype=torch.float64, experts_implementation="eager")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "prefill_chunk_size": chunk}
    prompt = left_padded(lengths, seed=seed)
    stock = model.generate(**prompt, **options)
    with under_each(model):
        assert model.generate(**prompt, **options).tolist() == stock.tolist()
