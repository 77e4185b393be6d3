"""kvtier: a session under a policy, and how many bytes of keys and values its steps read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import torch

from benchmarks.registry import BenchmarkError
from benchmarks.workload import KV, Shape, Token, decode_token, feed_generated, feed_prompt
from kvtier.config import StoreConfig
from kvtier.core.compose import policy
from kvtier.core.memory import Memory
from kvtier.types import DTYPE_BYTES, Budgets

if TYPE_CHECKING:
    from kvtier.core.report import SessionReport
    from kvtier.core.session import Session

__all__ = ["POLICIES", "TieredLayers", "Traffic", "TrafficMeter", "Treatment", "treatment"]

SHARE: Final = 16
"""Quest reads, and SnapKV keeps, one token of so many."""


class Treatment(NamedTuple):
    """A policy in words, and its budgets."""

    policy: str
    budgets: Budgets


POLICIES: Final = ("full", "quest", "snapkv")


def treatment(name: str, context: int) -> Treatment:
    """How a policy is run at a context of so many tokens.

    Quest leaves its first two layers dense by default; here every layer is sparse, as 30 of the 32 of an 8B model are.
    """
    if name == "quest":
        return Treatment("quest(dense_layers=0)", Budgets(read=context // SHARE))
    return Treatment(name, Budgets(keep=context // SHARE) if name == "snapkv" else Budgets())


class TieredLayers:
    """A session of its own memory, without tiers below the device, in the middle of a generation.

    Parameters
    ----------
    layers : sequence of KV
        Keys and values, copied into pages.
    generated : int
        How many tokens at the end came one at a time, after the prompt.
    """

    def __init__(self, name: str, layers: Sequence[KV], shape: Shape, *, generated: int) -> None:
        words, budgets = treatment(name, layers[0].tokens)
        self.shape = shape
        self.layers = len(layers)
        devices = [torch.device(shape.device)] * self.layers
        self.memory = Memory(shape.layout(self.layers), policy(words), budgets, StoreConfig(), devices)
        self.session: Session = self.memory.session()
        self.session.expect(layers[0].tokens - generated)
        tails = []
        for index, held in enumerate(layers):
            prompt, tail = held.split(generated)
            feed_prompt(self.session, index, prompt, shape)
            tails.append(tail)
        feed_generated(self.session, tails)
        self.meter = TrafficMeter(self.session, self.memory, generated=generated)

    def tokens(self) -> list[Token]:
        """The next token, as each layer gets it; the layers of a step share one tensor of positions."""
        position = self.session.length
        first = decode_token(self.shape, position)
        return [
            first,
            *(decode_token(self.shape, position)._replace(positions=first.positions) for _ in range(self.layers - 1)),
        ]

    def step(self, tokens: Sequence[Token]) -> None:
        """Append and attend, layer after layer."""
        append, attend, scale = self.session.append, self.session.attend, self.shape.scale
        for layer, (query, key, value, positions) in enumerate(tokens):
            append(layer, key, value, positions)
            attend(layer, query, positions, scale=scale)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.close()
        self.memory.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that one decode step read, mean over steps and summed over layers.

    Parameters
    ----------
    kv_bytes : int
        Keys and values of the pages read, and of the tail.
    sketch_bytes : int
        Summaries of pages, all of them read to rank the pages.
    """

    kv_bytes: int
    sketch_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Both."""
        return self.kv_bytes + self.sketch_bytes


class TrafficMeter:
    """Counts what a session's decode steps read, from the session's own report, since the meter was made.

    Parameters
    ----------
    generated : int
        Tokens appended after the prompt already; an eviction does not bound them.
    """

    def __init__(self, session: Session, memory: Memory, *, generated: int) -> None:
        self._generated = generated
        self._session = session
        self._memory = memory
        self._before = session.report()

    def per_step(self) -> Traffic:
        """The mean over the steps so far.

        Raises
        ------
        BenchmarkError
            When a policy read or kept more than its budget.
        """
        before, after = self._before, self._session.report()
        layout, policy = self._memory.layout, self._memory.policy
        layers, shape = len(layout.layers), layout.layers[0]
        layer_steps = (after.tokens - before.tokens) * layers
        held = (after.pages_held - before.pages_held) / layer_steps
        read = (after.pages_read - before.pages_read) / layer_steps
        tail = _mean_length(before, after) - held * layout.page_tokens
        tokens = read * layout.page_tokens + tail
        self._check(tokens, before, after)
        sketch = policy.retrieval.sketch_bytes(shape.key_dim, DTYPE_BYTES[shape.dtype]) if policy.retrieval else 0
        ranked = held if read < held else 0
        return Traffic(
            kv_bytes=round(layers * tokens * shape.token_bytes),
            sketch_bytes=round(layers * ranked * shape.num_kv_heads * sketch),
        )

    def _check(self, tokens: float, before: SessionReport, after: SessionReport) -> None:
        bound = self._memory.policy
        allowed = [bound.read] if bound.read is not None else []
        if bound.keep is not None:
            allowed.append(max(bound.keep) + self._generated + after.tokens - before.tokens)
        if allowed and tokens > min(allowed):
            raise BenchmarkError(f"{bound.label} must read at most {min(allowed)} tokens a step, it read {tokens:.0f}")


def _mean_length(before: SessionReport, after: SessionReport) -> float:
    """Slots held in each step, mean over the steps: every step adds one before it reads."""
    return (before.kept + 1 + after.kept) / 2
