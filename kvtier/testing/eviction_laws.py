"""The laws of an eviction that was carried out: what a session attends to after a prompt, seen from outside alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import pytest
import torch
from hypothesis import strategies as st

from kvtier.config import load_config
from kvtier.core.memory import Memory
from kvtier.core.policy import PositionMode, SelectionPolicy
from kvtier.errors import CompositionError
from kvtier.testing.draws import DTYPES, table
from kvtier.testing.law import PolicyLaws, law, require
from kvtier.testing.plain_slots import rotate
from kvtier.testing.selection_laws import least_budget
from kvtier.types import Budgets, DTypeName, KVLayout, LayerLayout, Rope

__all__ = ["Evicting", "EvictionLaws", "Prompt", "prompts"]

_SCALE = 0.5
_DIM = 2
_ROPE = Rope(frequencies=(0.7,))


class Evicting(Protocol):
    """What the laws ask of a session; `kvtier.core.session.Session` is one."""

    @property
    def length(self) -> int:
        """Tokens seen, whether kept or not."""

    def expect(self, tokens: int) -> None:
        """Announce a prompt."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """Add K [B, Hk, T, Dk] and V [B, Hk, T, Dv]."""

    def attend(self, layer: int, q: torch.Tensor, positions: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Attention of q [B, Hq, T, Dk]."""


@dataclass(frozen=True)
class Prompt:
    """Queries [B, Hq, T + 1, D] and keys [B, Hk, T + 1, D] of a prompt of T tokens and the token after it."""

    query: torch.Tensor
    keys: torch.Tensor
    keep: int

    @property
    def tokens(self) -> int:
        """Tokens T of the prompt."""
        return self.keys.shape[2] - 1

    @property
    def layout(self) -> KVLayout:
        """One layer of this shape, whose values name the token they belong to."""
        dtypes: dict[torch.dtype, DTypeName] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
        return KVLayout(layers=(self._layer(dtypes[self.keys.dtype]),), page_tokens=4, block_tokens=8, chunk_tokens=16)

    def _layer(self, dtype: DTypeName) -> LayerLayout:
        return LayerLayout(
            num_query_heads=self.query.shape[1],
            num_kv_heads=self.keys.shape[1],
            key_dim=_DIM,
            value_dim=self.keys.shape[2],
            dtype=dtype,
            rope=_ROPE,
        )

    def row(self, row: int) -> Prompt:
        """The prompt of one row."""
        return Prompt(self.query[row : row + 1], self.keys[row : row + 1], self.keep)

    def weights(self, session: Evicting) -> torch.Tensor:
        """What the token after the prompt attends to [B, Hq, T + 1]; an evicted token has weight 0."""
        values = torch.eye(self.tokens + 1, dtype=self.keys.dtype).expand(*self.keys.shape[:2], -1, -1)
        session.expect(self.tokens)
        out = torch.empty(0)
        for part in (slice(0, self.tokens), slice(self.tokens, self.tokens + 1)):
            positions = torch.arange(part.start, part.stop)[None]
            session.append(0, self.keys[:, :, part], values[:, :, part], positions)
            out = session.attend(0, self.query[:, :, part], positions, scale=_SCALE)
        return out[:, :, 0].float()

    def describe(self) -> str:
        """The case in words."""
        rows, heads = self.keys.shape[:2]
        return (
            f"{rows} rows, {heads} KV heads of {self.query.shape[1] // heads} query heads, a prompt of {self.tokens} "
            f"tokens, keep {self.keep}, {self.keys.dtype}; {table('keys', self.keys)}; {table('queries', self.query)}"
        )


@st.composite
def prompts(draw: st.DrawFn, *, least_keep: int = 1) -> Prompt:
    """Prompts of up to 3 rows, 2 KV heads of 1, 2 or 4 query heads and ``least_keep`` + 12 tokens."""
    rows, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    tokens, dtype = draw(st.integers(1, least_keep + 12)), draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    query, keys = (
        torch.randint(-8, 9, (rows, count, tokens + 1, _DIM), generator=random).to(dtype) / 8
        for count in (heads * group, heads)
    )
    return Prompt(query, keys, draw(st.integers(least_keep, max(tokens + 2, least_keep))))


def _prompts(suite: EvictionLaws, policy: SelectionPolicy) -> st.SearchStrategy[Prompt]:
    del suite
    return prompts(least_keep=least_budget(policy))


class EvictionLaws(PolicyLaws):
    """What holds when a selection policy runs in a session, or in a runtime of yours; override ``policy``.

    Override `open_session` to hold another runtime to the laws.
    """

    @contextmanager
    def open_session(self, policy: SelectionPolicy, prompt: Prompt) -> Iterator[Evicting]:
        """A fresh session that evicts by this policy; a kvtier one by default."""
        config = load_config(
            {"tiers": [{"name": "host", "backend": "host", "capacity": "1MiB"}], "page_tokens": 4, "block_tokens": 8}
        )
        try:
            memory = Memory(prompt.layout, policy, Budgets(keep=prompt.keep), config)
        except CompositionError as refused:
            pytest.skip(f"a session refuses this policy: {refused}")
        session = memory.session()
        try:
            yield session
        finally:
            session.close()
            memory.close()

    @law(
        "S15",
        "after an eviction the next token has its logical position, not the number of kept tokens",
        prompt=_prompts,
    )
    def test_positions_survive(self, policy: SelectionPolicy, prompt: Prompt) -> None:
        with self.open_session(policy, prompt) as session:
            prompt.weights(session)
            require(
                session.length == prompt.tokens + 1,
                f"{prompt.tokens} tokens of prompt and one more were seen; the next would be at {session.length}",
            )

    @law(
        "S16",
        "what is kept is attended to exactly, each KV head keeps its budget for all its query heads",
        prompt=_prompts,
    )
    def test_kept_tokens_are_attended_exactly(self, policy: SelectionPolicy, prompt: Prompt) -> None:
        if type(policy).merge is not SelectionPolicy.merge:
            pytest.skip(f"{policy.name} merges: a kept slot also holds what was dropped")
        with self.open_session(policy, prompt) as session:
            weights = prompt.weights(session)
        require(bool(weights.isfinite().all()), "attention is not finite")
        group = prompt.query.shape[1] // prompt.keys.shape[1]
        seen = (weights > 0).unflatten(1, (-1, group))
        require(bool((seen == seen[:, :, :1]).all()), "query heads of one KV head see different tokens")
        must, least = min(prompt.keep, prompt.tokens) + 1, min(policy.least(prompt.keep), prompt.tokens) + 1
        counts = seen[:, :, 0].sum(-1)
        right_counts = (counts.sum(-1) == must * counts.shape[1]) & (counts >= least).all(-1)
        require(
            bool(right_counts.all()),
            f"{must} tokens a KV head must be seen, the new one among them, and {least} by each; got {counts.tolist()}",
        )
        query, keys = prompt.query[:, :, -1:].float(), prompt.keys.float().repeat_interleave(group, 1)
        if policy.position_mode is PositionMode.COMPACT:
            # A kept token's place is the number of kept ones before it.
            dropped = (weights == 0).cumsum(-1)
            keys, query = (
                rotate(_ROPE, part, -at).float() for part, at in ((keys, dropped), (query, dropped[..., -1:]))
            )
        logits = (query * keys).sum(-1) * _SCALE
        right = torch.softmax(logits.masked_fill(weights == 0, -torch.inf), dim=-1)
        slack = 1e-5 if prompt.keys.dtype == torch.float32 else 2**-8
        worst = float((weights - right).abs().max())
        require(worst <= slack, f"a kept token's weight is off by {worst:g}; its key or its place is another's")

    @law("S17", "a row is evicted the same in any company", prompt=_prompts)
    def test_rows_do_not_leak(self, policy: SelectionPolicy, prompt: Prompt) -> None:
        with self.open_session(policy, prompt) as session:
            together = prompt.weights(session) > 0
        for row in range(prompt.keys.shape[0]):
            with self.open_session(policy, prompt.row(row)) as session:
                alone = prompt.row(row).weights(session)[0] > 0
            require(torch.equal(alone, together[row]), f"row {row} keeps other tokens alone than in company")
