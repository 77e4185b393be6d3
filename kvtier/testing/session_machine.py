"""A stateful test of the session: any order of its operations equals plain tensors, on every tier.

Subclass ``SessionMachine``, set what differs (layout, policy, budgets, tiers), and run its ``TestCase``::

    class Spilling(SessionMachine):
        device_bytes = 60_000
        tiers = {"tiers": [{"name": "host", "backend": "host", "capacity": "64KiB"}]}

    TestSpilling = Spilling.TestCase
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.config import load_config
from kvtier.core.compose import policy
from kvtier.core.draft_tree import DraftTree, RowTree, TreePath
from kvtier.core.memory import Memory
from kvtier.core.policy import Policy
from kvtier.core.session import Session
from kvtier.testing.draft_draws import draw_path, draw_tree
from kvtier.testing.oracles import PlainSession
from kvtier.types import Budgets, KVLayout, LayerLayout, Rope

__all__ = ["Oracle", "SessionMachine", "small_layout"]

_SCALE = 0.3
_FORKS = 3


class Oracle(Protocol):
    """What the machine asks of the slow and obvious session beside the one under test."""

    @property
    def length(self) -> int:
        """Columns."""

    @property
    def rows(self) -> int:
        """Sequences."""

    def append(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        /,
        *,
        tree: DraftTree | None = None,
    ) -> None:
        """Add K and V of one layer, or draft them."""

    def attend(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, /, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """What attention must give."""

    def expect(self, tokens: int, /) -> None:
        """A prompt comes."""

    def fork(self) -> Oracle:
        """A second one."""

    def reorder(self, rows: Sequence[int], /) -> None:
        """Rows change places."""

    def crop(self, remove: int, /) -> None:
        """Columns are forgotten."""

    def accept(self, path: TreePath, /) -> object:
        """What is drafted is committed, or not."""

    def close(self) -> None:
        """Drop everything."""


def small_layout(window: int | None = None, *, heads: int = 2, group: int = 2, rope: Rope | None = None) -> KVLayout:
    """Three small fp64 layers, pages of 4 and blocks of 8; the middle layer slides if ``window`` is given."""

    def layer(sliding: int | None) -> LayerLayout:
        return LayerLayout(
            num_query_heads=heads * group,
            num_kv_heads=heads,
            key_dim=6,
            value_dim=4,
            dtype="float64",
            window=sliding,
            rope=rope,
        )

    return KVLayout(layers=(layer(None), layer(window), layer(None)), page_tokens=4, block_tokens=8, chunk_tokens=16)


class SessionMachine(RuleBasedStateMachine):
    """Random appends, forks, crops, reorders, drafts, saves, demotions and promotions against an oracle.

    Attributes
    ----------
    layout, policy_text, keep, device_bytes, tiers
        What the memory under test is made of; ``make_oracle`` must do what the policy does.
    rows : int
        Rows of the batch.
    tolerance : float
        Largest absolute error of attention.
    """

    layout: ClassVar[KVLayout] = small_layout()
    policy_text: ClassVar[str] = "full"
    keep: ClassVar[int | None] = None
    device_bytes: ClassVar[int | None] = None
    tiers: ClassVar[Mapping[str, Any]] = {"tiers": [{"name": "host", "backend": "host", "capacity": "16MiB"}]}
    rows: ClassVar[int] = 2
    tolerance: ClassVar[float] = 1e-10

    def __init__(self) -> None:
        super().__init__()
        config = load_config({**self.tiers, "page_tokens": 4, "block_tokens": 8})
        self.memory = Memory(self.layout, self.make_policy(), self.make_budgets(), config)
        self.pairs: list[tuple[Session, Oracle]] = [(self.memory.session(), self.make_oracle())]
        self.current = 0
        self.next_position = [0]
        for session, _ in self.pairs:
            session.record_past(True)

    def make_policy(self) -> Policy:
        """The policy under test; ``policy_text`` read by default."""
        return policy(self.policy_text)

    def make_budgets(self) -> Budgets:
        """Its budgets."""
        return Budgets(keep=self.keep, device=self.device_bytes)

    def make_oracle(self) -> Oracle:
        """What the session must equal; one that keeps everything by default."""
        return PlainSession(len(self.layout.layers))

    @rule(tokens=st.integers(1, 40), seed=st.integers(0, 2**16), equal=st.booleans())
    def append(self, tokens: int, seed: int, equal: bool) -> None:
        """Append to every layer and attend; rows may be equal, so that they share pages."""
        note(f"append {tokens} tokens to session {self.current}, equal rows: {equal}")
        self.feed(tokens, seed, equal=equal)

    def feed(self, tokens: int, seed: int, *, equal: bool) -> None:
        """Append random tokens to every layer of both, attend, and compare."""
        session = self.pairs[self.current][0]
        start = self.next_position[self.current]
        positions = torch.arange(start, start + tokens)[None].expand(session.rows or self.rows, tokens)
        self.run(positions, seed, equal=equal)
        self.next_position[self.current] += tokens

    def run(self, positions: torch.Tensor, seed: int, *, equal: bool, tree: DraftTree | None = None) -> None:
        """Append random tokens at ``positions`` [B, Tq], attend, and compare where there are tokens."""
        session, plain = self.pairs[self.current]
        rows, tokens = positions.shape
        # Never the same tokens twice: equal votes would leave the choice to rounding.
        random = torch.Generator().manual_seed(seed + int(positions[0, 0]) * 2**20)
        for index, layer in enumerate(self.layout.layers):
            count = 1 if equal else rows

            def draw(heads: int, dim: int, count: int = count) -> torch.Tensor:
                drawn = torch.randn(count, heads, tokens, dim, generator=random, dtype=torch.float64)
                return drawn.expand(rows, heads, tokens, dim)

            keys, values = draw(layer.num_kv_heads, layer.key_dim), draw(layer.num_kv_heads, layer.value_dim)
            query = draw(layer.num_query_heads, layer.key_dim)
            session.append(index, keys, values, positions, tree=tree)
            plain.append(index, keys, values, positions, tree=tree)
            got = session.attend(index, query, positions, scale=_SCALE, window=layer.window)
            expected = plain.attend(index, query, positions, scale=_SCALE, window=layer.window)
            torch.testing.assert_close(got, expected, rtol=0, atol=self.tolerance)

    @precondition(lambda self: len(self.pairs) < _FORKS)
    @rule()
    def fork(self) -> None:
        """Go on in a fork; the original stays and must not change."""
        session, plain = self.pairs[self.current]
        self.pairs.append((session.fork(), plain.fork()))
        self.next_position.append(self.next_position[self.current])
        self.current = len(self.pairs) - 1
        note(f"fork into session {self.current}")

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(index=st.integers(0, _FORKS - 1))
    def switch(self, index: int) -> None:
        """Go on in another fork."""
        self.current = index % len(self.pairs)
        note(f"switch to session {self.current}")

    @precondition(lambda self: len(self.pairs) > 1)
    @rule()
    def close(self) -> None:
        """Close the current fork; the others keep their pages."""
        note(f"close session {self.current}")
        session, plain = self.pairs.pop(self.current)
        self.next_position.pop(self.current)
        session.close()
        plain.close()
        self.current = 0

    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        """Forget some of the newest columns."""
        session, plain = self.pairs[self.current]
        remove = int(share * session.croppable)
        note(f"crop {remove} of {session.length}")
        session.crop(remove)
        plain.crop(remove)
        self.next_position[self.current] -= remove

    @precondition(lambda self: self.pairs[self.current][0].rows > 0)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Permute, repeat or drop rows, as a beam search does."""
        session, plain = self.pairs[self.current]
        order = data.draw(st.lists(st.integers(0, session.rows - 1), min_size=self.rows, max_size=self.rows))
        note(f"reorder rows {order}")
        session.reorder(order)
        plain.reorder(order)

    @precondition(lambda self: self.pairs[self.current][0].length > 0)
    @rule(data=st.data(), seed=st.integers(0, 2**16), equal=st.booleans(), levels=st.integers(1, 2))
    def draft(self, data: st.DataObject, seed: int, equal: bool, levels: int) -> None:
        """Draft trees of tokens, each row its own, in one append or two, and accept a path of each."""
        self.speculate(data, seed, equal=equal, levels=levels)

    def speculate(self, data: st.DataObject, seed: int, *, equal: bool, levels: int) -> None:
        """Draft in both, compare, and accept."""
        session, plain = self.pairs[self.current]
        start, pending = self.next_position[self.current], [RowTree()] * session.rows
        for level in range(levels):
            tree = draw_tree(data, session.rows, most=5, behind=[len(row.parents) for row in pending])
            note(f"draft {tree.rows} in session {self.current}, equal rows: {equal}")
            positions = torch.full((session.rows, tree.tokens), start)
            for row, parents in enumerate(tree.of_rows(session.rows)):
                places = pending[row].places(parents, start)
                positions[row, : len(parents)] = torch.tensor(places, dtype=torch.int64)
                pending[row] = pending[row].grown(parents, places, last=None, column=0)
            self.run(positions, seed + level, equal=equal, tree=tree)
        paths = [draw_path(data, row.parents) for row in pending]
        note(f"accept {paths}")
        session.accept(paths)
        plain.accept(paths)
        self.next_position[self.current] += max(map(len, paths))

    @rule()
    def save_and_restore(self) -> None:
        """Save to a file, close, and go on with what the file gives back."""
        session, _ = self.pairs[self.current]
        note(f"save and restore session {self.current}")
        with tempfile.TemporaryDirectory(prefix="kvtier-machine-") as directory:
            path = Path(directory) / "session.kvs"
            session.save(path, model="machine")
            session.close()
            self.pairs[self.current] = (self.memory.restore(path, model="machine"), self.pairs[self.current][1])

    @rule(share=st.floats(0, 1))
    def demote(self, share: float) -> None:
        """Push pages off the device, as pressure would where there is a budget."""
        for group in [group for group in self.memory.groups if group.store.bounded]:
            held = group.arena.total_frames - group.arena.free_frames
            group.store.tick()
            group.store.demote(int(share * held), 0)
        note(f"demote {share:.2f} of the resident pages")

    @rule()
    def promote(self) -> None:
        """Bring back what fits, in the background."""
        note("prefetch all pages that fit")
        for group in self.memory.groups:
            live = torch.from_numpy(group.store.table.refs).nonzero()[:, 0].numpy()
            group.store.prefetch(live, most=group.arena.free_frames)

    @invariant()
    def lengths_agree(self) -> None:
        """Columns and rows are those of the oracle."""
        for session, plain in self.pairs:
            if session.length != plain.length or session.rows != plain.rows:
                raise AssertionError(f"{session.length}, {session.rows} != {plain.length}, {plain.rows}")

    @invariant()
    def bytes_are_accounted(self) -> None:
        """No device budget is passed; frames used equal resident pages; slots used equal copies below."""
        for ledger in self.memory.ledgers.values():
            if ledger.limit is not None and ledger.peak > ledger.limit:
                raise AssertionError(f"peak {ledger.peak} > limit {ledger.limit}")
        for group in self.memory.groups:
            store = group.store
            store.settle()
            used = group.arena.total_frames - group.arena.free_frames
            if used != int(store.table.copy[0].sum()):
                raise AssertionError(f"{used} frames used, {int(store.table.copy[0].sum())} pages resident")
            for tier, backend in store.lower.backends.items():
                if backend.used_slots != int(store.table.copy[tier].sum()):
                    raise AssertionError(
                        f"tier {tier}: {backend.used_slots} slots, {store.table.copy[tier].sum()} copies"
                    )

    def teardown(self) -> None:
        """Closing every session frees every page in every tier."""
        for session, _ in self.pairs:
            session.close()
        for group in self.memory.groups:
            if group.store.table.live or any(backend.used_slots for backend in group.store.lower.backends.values()):
                raise AssertionError("pages outlived their sessions")
        left = {
            purpose: count for ledger in self.memory.ledgers.values() for purpose, count in ledger.by_purpose.items()
        }
        if any(left.values()):
            raise AssertionError(f"bytes outlived their sessions: {left}")
        self.memory.close()
