"""The presses of kvpress under the laws of selection, each as its users run it, on small random Llamas.

python benchmarks/run.py policies --install --quick
PYTHONPATH=$(echo .peers/kvpress/lib/python*/site-packages) python -P benchmarks/peers/kvpress/laws.py
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Final

import kvpress
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from kvtier.core.policy import KeepPlan
from kvtier.testing.law import CALM, PHASES, Law, LawBroken, PolicyLaws, law, laws_of, require
from kvtier.testing.selection_laws import SelectionLaws

_SAME: Final = ("S1", "S3", "S4", "S5", "S13")  # laws that ask nothing but the plan
_DIM: Final = 8

MAKERS: Final[dict[str, Callable[[], Any]]] = {
    "Random": kvpress.RandomPress,
    "Knorm": kvpress.KnormPress,
    "StreamingLLM": lambda: kvpress.StreamingLLMPress(n_sink=1),
    "TOVA": kvpress.TOVAPress,
    "SnapKV": lambda: kvpress.SnapKVPress(window_size=2, kernel_size=3),
    "PyramidKV": lambda: kvpress.PyramidKVPress(window_size=2, kernel_size=3),
    "ExpectedAttention": lambda: kvpress.ExpectedAttentionPress(n_future_positions=8, n_sink=1),
    "ObservedAttention": kvpress.ObservedAttentionPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "LagKV": lambda: kvpress.LagKVPress(n_sink=1, lag_size=2),
    "LeverageScore": lambda: kvpress.LeverageScorePress(sketch_dimension=4),
    "NonCausalAttn": lambda: kvpress.NonCausalAttnPress(chunk_size=4),
    "CUR": lambda: kvpress.CURPress(num_sinks=1),
    "ChunkKV(SnapKV)": lambda: kvpress.ChunkKVPress(kvpress.SnapKVPress(window_size=2, kernel_size=3), chunk_length=3),
    "CriticalKV(Knorm)": lambda: kvpress.CriticalKVPress(kvpress.KnormPress()),
    "Block(Knorm)": lambda: kvpress.BlockPress(kvpress.KnormPress(), block_size=3),
    "EntropyGatedChunkKV(SnapKV)": lambda: kvpress.EntropyGatedChunkKVPress(
        kvpress.SnapKVPress(window_size=2, kernel_size=3), chunk_length=3, low_entropy_chunk_length=1
    ),
    "Compactor": lambda: kvpress.CompactorPress(
        sink_size_start=1, sink_size_end=1, chunk_size=4, sketch_dimension=4, blending=0.5
    ),
    "Cap": lambda: kvpress.CapPress(n_future_positions=8, n_sink=1),
    "AdaKV(Knorm)": lambda: kvpress.AdaKVPress(kvpress.KnormPress()),
    "AdaKV(SnapKV)": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(window_size=2, kernel_size=3)),
    "CriticalAdaKV(Knorm)": lambda: kvpress.CriticalAdaKVPress(kvpress.KnormPress()),
}
"""Presses that need no trained parameters, with windows for short prompts."""


@dataclass(frozen=True)
class Press:
    """A press, kept from one prompt to the next as in a service."""

    name: str
    press: Any

    @property
    def shares_heads(self) -> bool:
        """Whether the heads of a layer share a budget, by masking keys that stay in the cache."""
        return hasattr(self.press, "alpha_safeguard")

    def least(self, keep: int) -> int:
        """Tokens that every KV head must keep."""
        return max(1, int(keep * self.press.alpha_safeguard)) if self.shares_heads else keep

    @property
    def attention(self) -> str:
        """The implementation of attention that it works with."""
        return "eager" if self.name == "ObservedAttention" else "sdpa"


@dataclass(frozen=True)
class PressCase:
    """Prompts [B, T] of random hidden states, and how many tokens a user asks to keep."""

    rows: int
    heads: int
    group: int
    slots: int
    keep: int
    dtype: torch.dtype
    seed: int
    picked: tuple[int, ...] | None = None

    @property
    def positions(self) -> torch.Tensor:
        """Positions [B, Hk, T]."""
        return torch.arange(self.slots).expand(len(self.picked or range(self.rows)), self.heads, self.slots)

    def hidden(self) -> torch.Tensor:
        """Hidden states [B, T, H] of the rows that are picked."""
        random = torch.Generator().manual_seed(self.seed)
        width = self.heads * self.group * _DIM
        drawn = torch.randn(self.rows, self.slots, width, generator=random).to(self.dtype)
        return drawn if self.picked is None else drawn[list(self.picked)]

    def plan(self, policy: Press, keep: int | None = None) -> torch.Tensor:
        """The slots of ``keeps``."""
        return self.keeps(policy, keep).keep

    def keeps(self, policy: Press, keep: int | None = None) -> KeepPlan:
        """The plan by which a press seems to have acted: the keys left in the cache, in their order there."""
        keep = min(self.keep if keep is None else keep, self.slots)
        policy.press.compression_ratio = 1 - keep / self.slots
        model = small_llama(self.heads, self.group, self.dtype, policy.attention)
        whole = _keys(model, self.hidden())
        # A press may draw: the same draw for the same prompt.
        torch.manual_seed(0)
        with policy.press(model):
            left = _keys(model, self.hidden())
        same = (left[:, :, :, None] == whole[:, :, None]).all(-1)
        require(bool(same.any(-1).all()), "a key in the cache is none of the prompt's")
        return self._unmasked(model) if policy.shares_heads else KeepPlan(same.int().argmax(-1))

    def _unmasked(self, model: Any) -> KeepPlan:
        """What attention will see of a cache that keeps every key."""
        masked = model.model.layers[0].self_attn.masked_key_indices
        stays = torch.ones(self.positions.shape, dtype=torch.bool)
        if masked is not None:
            stays[masked] = False
        return KeepPlan.of(stays)

    def describe(self) -> str:
        """The case in words."""
        return (
            f"{len(self.picked or range(self.rows))} rows, {self.heads} KV heads of {self.group} query heads, a prompt "
            f"of {self.slots} tokens, keep {self.keep}, {self.dtype}, seed {self.seed}"
        )


@st.composite
def cases(draw: st.DrawFn) -> PressCase:
    """Prompts of 8 to 30 tokens."""
    slots = draw(st.integers(8, 30))
    return PressCase(
        rows=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 4])),
        slots=slots,
        keep=draw(st.integers(1, slots)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 50)),
    )


class PressLaws(PolicyLaws):
    """What a press can be asked beside its plan."""

    @law("S6", "a row is planned the same in any company and in any order", case=cases())
    def test_rows_are_planned_alone(self, policy: Press, case: PressCase) -> None:
        """A press averages over heads if its paper does, so only rows are asked for."""
        for row, mine in enumerate(map(_sorted, case.keeps(policy).rows())):
            (alone,) = map(_sorted, replace(case, picked=(row,)).keeps(policy).rows())
            require(alone == mine, f"row {row} keeps {alone} alone, {mine} in company")


@functools.cache
def small_llama(heads: int, group: int, dtype: torch.dtype, attention: str) -> Any:
    """A Llama of one layer with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=heads * group * _DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=heads * group,
        num_key_value_heads=heads,
        head_dim=_DIM,
        vocab_size=16,
        attn_implementation=attention,
        initializer_range=0.2,  # attention that is neither even nor a single token
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def laws() -> list[Law]:
    """The laws that are asked of a press, in the order of their codes."""
    asked = [stated for stated in laws_of(SelectionLaws) if stated.code in _SAME]
    own = [replace(stated, sources={**stated.sources, "case": cases()}) for stated in asked]
    own = [
        replace(stated, sources={**stated.sources, "other": cases()}) if "other" in stated.sources else stated
        for stated in own
    ]
    return sorted([*own, *laws_of(PressLaws)], key=lambda stated: (len(stated.code), stated.code))


def verdict(stated: Law, press: Press, examples: int) -> str:
    """The smallest counter-example; empty when the law holds in every case."""

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=PHASES,
        report_multiple_bugs=False,
        suppress_health_check=CALM,
    )
    @given(st.data())
    def hold(data: st.DataObject) -> None:
        stated.hold(PressLaws(), press, data)  # type: ignore[arg-type]

    try:
        hold()
    except LawBroken as broken:
        return str(broken)
    except Flaky as unsteady:
        return f"{stated.code}: once broken, once not, by the same case: {unsteady}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or JSON, of presses and laws, and every counter-example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=25)
    parser.add_argument("--press", action="append", choices=sorted(MAKERS))
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    stated = laws()
    found: dict[str, dict[str, str]] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in chosen.press or MAKERS:
            press = Press(name, MAKERS[name]())
            found[name] = {one.code: verdict(one, press, chosen.examples) for one in stated}
            row = "  ".join(f"{code} {'broken' if text else 'holds '}" for code, text in found[name].items())
            print(f"{name:20} {row}", file=sys.stderr, flush=True)
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    if chosen.json:
        print(json.dumps({"versions": versions, "examples": chosen.examples, "presses": found}, indent=2))
        return 0
    print(
        ", ".join(f"{name} {number}" for name, number in versions.items()), f"{chosen.examples} cases a law", sep="; "
    )
    for name, texts in found.items():
        for text in filter(None, texts.values()):
            print(f"\n{name}: {text}")
    return 0


def _sorted(heads: list[list[int]]) -> list[list[int]]:
    return [sorted(slots) for slots in heads]


def _keys(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Keys in the cache [B, Hk, T, D] after a prompt."""
    cache = transformers.DynamicCache()
    model.model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
    keys: torch.Tensor = cache.layers[0].keys
    return keys


if __name__ == "__main__":
    sys.exit(main())
