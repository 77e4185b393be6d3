"""Trees of drafted tokens through a model: logits of every line, and an accepted path as if nothing else was fed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtier.errors import InputError, SessionStateError
from kvtier.integrations.hf.cache import KVTierCache
from kvtier.integrations.hf.patch import PatchHandle, patch
from kvtier.testing.tiny_models import VOCABULARY, left_padded, tiny_model

Attach = Callable[..., PatchHandle]

TREE = [None, 0, 0, 2, None, 1]
LINES = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 2, 3], 4: [4], 5: [0, 1, 5]}
PROMPT = left_padded([13])["input_ids"]
TOKENS = torch.randint(2, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(3))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@torch.no_grad()
def alone(model: Any, *parts: torch.Tensor) -> torch.Tensor:
    """The last logits of tokens without any cache."""
    logits: torch.Tensor = model(torch.cat(parts, dim=1), use_cache=False).logits[0, -1]
    return logits


@torch.no_grad()
def drafted(model: Any, handle: PatchHandle, **options: Any) -> tuple[KVTierCache, torch.Tensor]:
    """A cache with the prompt and the tree, and the tree's logits [N, V]."""
    cache = handle.new_cache()
    model(PROMPT, past_key_values=cache)
    with cache.drafts(TREE):
        logits = model(TOKENS, past_key_values=cache, **options).logits[0]
    return cache, logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_each_token_sees_its_line(under_each: Attach, family: str) -> None:
    model = tiny_model(family)
    expected = {token: alone(model, PROMPT, TOKENS[:, line]) for token, line in LINES.items()}
    next_one = torch.tensor([[7]])
    after = alone(model, PROMPT, TOKENS[:, LINES[3]], next_one)
    with under_each(model) as handle:
        cache, logits = drafted(model, handle)
        for token, right in expected.items():
            torch.testing.assert_close(logits[token], right, **TOLERANCE)
        assert cache.get_seq_length() == 13
        cache.accept(LINES[3])
        assert cache.get_seq_length() == 16
        assert cache.input_ids is not None
        assert cache.input_ids.tolist() == [[*PROMPT[0].tolist(), *TOKENS[0, LINES[3]].tolist()]]
        with torch.no_grad():
            torch.testing.assert_close(model(next_one, past_key_values=cache).logits[0, -1], after, **TOLERANCE)


def test_a_tree_may_grow_level_by_level(under_each: Attach) -> None:
    model = tiny_model("llama")
    right, after = alone(model, PROMPT, TOKENS[:, [0, 2, 3]]), alone(model, PROMPT, TOKENS[:, [0, 2, 3, 0]])
    with under_each(model) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(PROMPT, past_key_values=cache)
        for parents, tokens in (([None], [0]), ([0, 0], [1, 2]), ([2, 1], [3, 5])):
            with cache.drafts(parents):
                logits = model(TOKENS[:, tokens], past_key_values=cache).logits
        torch.testing.assert_close(logits[0, 0], right, **TOLERANCE)
        cache.accept([0, 2, 3])
        torch.testing.assert_close(model(TOKENS[:, :1], past_key_values=cache).logits[0, -1], after, **TOLERANCE)


@torch.no_grad()
def test_rows_accept_paths_of_their_own(under_each: Attach) -> None:
    model, lengths = tiny_model("llama"), [11, 7, 9]
    prompt = left_padded(lengths)
    tokens = torch.randint(2, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(5))
    paths = [[0, 1], [], [0]]
    lines = [
        torch.cat([prompt["input_ids"][row, 11 - length :], tokens[row, path]])[None]
        for row, (length, path) in enumerate(zip(lengths, paths, strict=True))
    ]
    more = tokens[:, -1:]
    expected = [alone(model, line, more[row : row + 1]) for row, line in enumerate(lines)]
    with under_each(model) as handle:
        cache = handle.new_cache()
        first = (prompt["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**prompt, position_ids=first, past_key_values=cache)
        with cache.drafts([[None, 0, 1, 0], [None], [None, None]]):
            model(tokens, past_key_values=cache)
        cache.accept(paths)
        assert cache.padding.sum(1).tolist() == [13, 7, 10]

        mask = torch.cat([cache.padding, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        logits = model(more, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for row, right in enumerate(expected):
            torch.testing.assert_close(logits[row, -1], right, **TOLERANCE)
        with pytest.raises(SessionStateError, match="nothing is drafted"):
            cache.accept([])


@torch.no_grad()
def test_dropped_drafts_leave_nothing(under_each: Attach) -> None:
    model = tiny_model("llama")
    after = alone(model, PROMPT, TOKENS[:, :1])
    with under_each(model) as handle:
        cache, _ = drafted(model, handle)
        cache.accept([])
        torch.testing.assert_close(model(TOKENS[:, :1], past_key_values=cache).logits[0, -1], after, **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"attention_mask": torch.ones(1, 19)}, 6, "leave out attention_mask"),
        ({"attention_mask": torch.ones(1, 1, 6, 19)}, 6, "leave out attention_mask"),
        ({"position_ids": torch.arange(13, 19)[None]}, 6, "drafted tokens stand at .* they may be left out"),
        ({}, 5, r"takes tokens \[1, 6\] .* got \[1, 5\]"),
    ],
)
@torch.no_grad()
def test_a_refused_forward_drops_the_drafts(
    attached: Attach, options: dict[str, Any], tokens: int, message: str
) -> None:
    model = tiny_model("llama")
    after = alone(model, PROMPT, TOKENS[:, :1])
    with attached(model) as handle:
        cache = handle.new_cache()
        model(PROMPT, past_key_values=cache)
        with pytest.raises(InputError, match=message), cache.drafts(TREE):
            model(TOKENS[:, :tokens], past_key_values=cache, **options)
        torch.testing.assert_close(model(TOKENS[:, :1], past_key_values=cache).logits[0, -1], after, **TOLERANCE)


@torch.no_grad()
def test_positions_may_be_given(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        _, logits = drafted(model, handle)
        _, again = drafted(model, handle, position_ids=torch.tensor([[13, 14, 14, 15, 13, 15]]))
        assert torch.equal(logits, again)


@torch.no_grad()
def test_pending_drafts_come_first(under_each: Attach) -> None:
    model = tiny_model("llama")
    calls: list[Callable[[KVTierCache], object]] = [
        lambda cache: model(TOKENS, past_key_values=cache),
        lambda cache: model.generate(PROMPT, past_key_values=cache, max_new_tokens=1),
        copy.deepcopy,
    ]
    with under_each(model) as handle:
        cache, _ = drafted(model, handle)
        for call in calls:
            with pytest.raises(SessionStateError, match=r"drafted tokens are pending; .* cache.accept\(\[\]\)"):
                call(cache)
        cache.accept([4])
        assert cache.get_seq_length() == 14


def forward_twice(model: Any, cache: KVTierCache) -> None:
    with cache.drafts([None]):
        model(TOKENS[:, :1], past_key_values=cache)
        model(TOKENS[:, :1], past_key_values=cache)


@torch.no_grad()
def test_what_brings_no_tree(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = handle.new_cache()
        with pytest.raises(SessionStateError, match="drafted tokens follow a prompt"), cache.drafts([None]):
            pass
        model(PROMPT, past_key_values=cache)
        with pytest.raises(InputError, match="got parent 3"), cache.drafts([None, 3]):
            pass
        with cache.drafts([None]):
            pass
        model(TOKENS[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 14
        with pytest.raises(SessionStateError, match=r"one forward brings a tree; enter drafts\(\) again"):
            forward_twice(model, cache)
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("policy", "path"),
    [
        ("snapkv(window=4, keep=8)", [0, 2, 3]),
        ("quest(dense_layers=0, read=80)", [0, 2, 3]),
        # What such a policy evicts between two tokens of a path, the second one has seen: only the first is exact.
        ("h2o(recent=4, keep=9)", [0]),
        ("streamingllm(keep=9, positions='compact')", [4]),
    ],
)
@torch.no_grad()
def test_under_a_policy_an_accepted_path_equals_plain_steps(policy: str, path: list[int]) -> None:
    model = tiny_model("llama")
    prompt = left_padded([40])["input_ids"]
    with patch(model, policy) as handle:
        one, other = handle.new_cache(), handle.new_cache()
        for cache in (one, other):
            model(prompt, past_key_values=cache)
        with one.drafts(TREE):
            model(TOKENS, past_key_values=one)
        one.accept(path)
        for token in path:
            model(TOKENS[:, token : token + 1], past_key_values=other)
        logits = [model(TOKENS[:, :1], past_key_values=cache).logits for cache in (one, other)]
        torch.testing.assert_close(*logits, **TOLERANCE)
