"""Quest and SnapKV, simulated in plain torch on the induction model: what they read or keep holds every needle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, scaled_dot_product_attention
from transformers import AttentionInterface

from kvtier.testing.induction import InductionSpec

PAGE = 16
WINDOW = 32
SPEC = InductionSpec()
PREVIOUS = (0, 0)
MATCH = (SPEC.match_layer, SPEC.num_kv_heads - 1)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Causal attention [1, Tq, Hq, D] of the last Tq positions; ``allowed`` [1, Hk, 1, N] hides other keys."""
    asked, keys = query.shape[2], key.shape[2]
    if asked == keys:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    mask = torch.ones(asked, keys, dtype=torch.bool).tril(keys - asked)
    if allowed is not None:
        mask = mask & allowed.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@dataclass
class Quest:
    """Decode reads the pages of the highest box bound, mean over the group; the tail is always read."""

    read: int
    ranks: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        allowed = self.choose(module.layer_idx, query, key) if query.shape[2] == 1 else None
        return attend(query, key, value, allowed, scaling), None

    def choose(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """Keys read [1, Hk, 1, N], and on the way the rank of the page that holds the key of the highest logit."""
        heads, dim = key.shape[1], key.shape[3]
        full = key.shape[2] // PAGE
        pages = key[:, :, : full * PAGE].unflatten(2, (full, PAGE))
        grouped = query.reshape(1, heads, -1, dim)
        bounds = grouped.relu() @ pages.amax(3).mT - (-grouped).relu() @ pages.amin(3).mT
        scores = bounds.mean(2)

        best = (grouped @ key.mT).mean(2).argmax(-1)[0] // PAGE
        for head, page in enumerate(best.tolist()):
            if page < full:
                rank = int((scores[0, head] >= scores[0, head, page]).sum())
                self.ranks.setdefault((layer, head), []).append(rank)

        chosen = scores.topk(self.read // PAGE, dim=-1).indices
        read = torch.zeros(1, heads, full, dtype=torch.bool).scatter_(2, chosen, value=True)
        tail = torch.ones(1, heads, key.shape[2] - full * PAGE, dtype=torch.bool)
        return torch.cat((read.repeat_interleave(PAGE, dim=2), tail), dim=2)[:, :, None]


@dataclass
class SnapKV:
    """The last queries of the prompt vote, a max-pool spreads the votes, decode sees what is kept and what is new."""

    keep: int
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        allowed = None
        if query.shape[2] == WINDOW:
            self.kept[module.layer_idx] = self.select(query, key, scaling)
        elif query.shape[2] == 1:
            kept = self.kept[module.layer_idx]
            new = torch.ones(1, key.shape[1], 1, key.shape[2] - kept.shape[3], dtype=torch.bool)
            allowed = torch.cat((kept, new), dim=3)
        return attend(query, key, value, allowed, scaling), None

    def select(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Keys kept [1, Hk, 1, N]: ``keep`` of them, the window's own included."""
        heads, keys = key.shape[1], key.shape[2]
        group = query.shape[1] // heads
        logits = query @ key.repeat_interleave(group, dim=1).mT * scale
        seen = torch.ones(WINDOW, keys, dtype=torch.bool).tril(keys - WINDOW)
        votes = logits.masked_fill(~seen, -torch.inf).softmax(-1)[..., : keys - WINDOW].sum(2)
        votes = max_pool1d(votes, 7, stride=1, padding=3).unflatten(1, (heads, group)).mean(2)
        kept = torch.zeros(1, heads, keys, dtype=torch.bool)
        kept.scatter_(2, votes.topk(self.keep - WINDOW, dim=-1).indices, value=True)
        kept[..., keys - WINDOW :] = True
        return kept[:, :, None]


def lost(prefilled: Any, rule: Callable[..., Any], *, alone: bool) -> list[str]:
    """Answers that differ when a rule for attention holds from the last ``WINDOW`` tokens of the prompt on.

    ``alone``: the key word comes by itself, as a decode step does, so that not even its own match is exact.
    """
    (document, tokenizer, model), cache, prompts = prefilled
    AttentionInterface.register("kvtier_simulated", rule)
    stock, read, wrong = model.config._attn_implementation, cache.get_seq_length(), []
    model.set_attn_implementation("kvtier_simulated")
    try:
        with torch.inference_mode():
            for needle, prompt in zip(document.needles, prompts, strict=True):
                tokens, said = prompt, []
                if alone:
                    model(tokens[:, :-1], past_key_values=cache, logits_to_keep=1)
                    tokens = tokens[:, -1:]
                for _ in needle.values:
                    tokens = model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
                    said.append(int(tokens))
                if tokenizer.decode(said) != needle.answer:
                    wrong.append(needle.answer)
                cache.crop(read - cache.get_seq_length())
    finally:
        model.set_attn_implementation(stock)
    return wrong


def check_quest(prefilled: Any, read: int) -> None:
    quest = Quest(read)

    assert lost(prefilled, quest, alone=True) == []
    steps = sum(len(needle.values) for needle in prefilled.scene.document.needles)
    assert len(quest.ranks[MATCH]) == steps
    assert max(quest.ranks[MATCH]) <= read // PAGE
    assert max(quest.ranks[PREVIOUS]) <= 2


def test_quest_reads_the_pages_of_all_needles_in_4k(prefilled: Any) -> None:
    check_quest(prefilled, read=256)


@pytest.mark.slow
def test_quest_reads_the_pages_of_all_needles_in_16k(long_prefilled: Any) -> None:
    check_quest(long_prefilled, read=1024)


def test_quest_that_reads_one_page_loses_needles(prefilled: Any) -> None:
    assert len(lost(prefilled, Quest(PAGE), alone=True)) > len(prefilled.scene.document.needles) // 2


def test_box_bound_of_idle_heads_says_little(prefilled: Any) -> None:
    quest = Quest(256)
    lost(prefilled, quest, alone=True)
    noise = [ranks for place, ranks in quest.ranks.items() if SPEC.role(*place) == "noise"]

    assert noise
    assert all(sum(ranks) / len(ranks) > 3 * 256 // PAGE for ranks in noise)


def test_snapkv_keeps_all_needles_of_4k(prefilled: Any) -> None:
    assert lost(prefilled, SnapKV(512), alone=False) == []


@pytest.mark.slow
def test_snapkv_keeps_all_needles_of_16k(long_prefilled: Any) -> None:
    assert lost(long_prefilled, SnapKV(2048), alone=False) == []


def test_the_last_tokens_alone_hold_no_needle(prefilled: Any) -> None:
    class Recent(SnapKV):
        def select(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
            kept = torch.zeros(1, key.shape[1], 1, key.shape[2], dtype=torch.bool)
            kept[..., -WINDOW:] = True
            return kept

    assert len(lost(prefilled, Recent(WINDOW), alone=False)) == len(prefilled.scene.document.needles)
