"""A stateful test of a policy in a session: whatever it evicts, merges or reads, attention is that of its own plans.

Subclass ``PolicyMachine``, say how the policy is made, and run its ``TestCase``::

    class Mine(PolicyMachine):
        keep = 24

        def make_policy(self) -> Policy:
            return MySelection(window=4) | Quest(read=16)

    TestMine = Mine.TestCase
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvtier.core.attention import positions_of
from kvtier.core.ring import WindowSequence
from kvtier.testing.plain_policies import PlainPolicySession
from kvtier.testing.session_machine import Oracle, SessionMachine, small_layout
from kvtier.types import Budgets, KVLayout, Rope

__all__ = ["PolicyMachine"]


class PolicyMachine(SessionMachine):
    """Prompts in chunks, steps, drafts, forks, beams, crops, demotions and promotions under any policy.

    The oracle carries out the policy's own plans over plain tensors, so what is tested is the runtime: that what was
    planned is what is attended to, whatever happened in between and wherever the pages lie.

    Attributes
    ----------
    keep, read : int, optional
        Budgets, in tokens.
    tolerance : float
        Largest absolute error of attention: the sum of the bounds that the policies declare. Merge weights are fp32.
    """

    layout: ClassVar[KVLayout] = small_layout(rope=Rope(frequencies=(1.0, 0.1)))
    keep: ClassVar[int | None] = None
    read: ClassVar[int | None] = None

    def make_budgets(self) -> Budgets:
        """Those of the class."""
        return Budgets(keep=self.keep, read=self.read, device=self.device_bytes)

    def make_oracle(self) -> Oracle:
        """Plans carried out as written."""
        return PlainPolicySession(self.layout, self.memory.policy)

    @rule(
        chunks=st.lists(st.integers(1, 24), min_size=1, max_size=3),
        seed=st.integers(0, 2**16),
        equal=st.booleans(),
        beams=st.booleans(),
    )
    def prompt(self, chunks: list[int], seed: int, equal: bool, beams: bool) -> None:
        """Announce a prompt and feed it in chunks; between two of them rows may change places."""
        note(f"a prompt of {chunks} tokens for session {self.current}, equal rows: {equal}, rows turned: {beams}")
        session, plain = self.pairs[self.current]
        session.expect(sum(chunks))
        plain.expect(sum(chunks))
        for place, tokens in enumerate(chunks):
            if beams and place:
                order = [*range(1, session.rows), 0]
                session.reorder(order)
                plain.reorder(order)
            self.feed(tokens, seed + place, equal=equal)
        self.check_kept()

    @precondition(lambda self: self.pairs[self.current][0].length > 0)
    @rule(tokens=st.integers(1, 12), seed=st.integers(0, 2**16), equal=st.booleans())
    def append(self, tokens: int, seed: int, equal: bool) -> None:
        """Decode: one token after the other."""
        note(f"{tokens} steps in session {self.current}, equal rows: {equal}")
        for step in range(tokens):
            self.feed(1, seed + step, equal=equal)
        self.check_kept()

    @precondition(lambda self: self.pairs[self.current][0].length > 0)
    @rule(data=st.data(), seed=st.integers(0, 2**16), equal=st.booleans(), levels=st.integers(1, 2))
    def draft(self, data: st.DataObject, seed: int, equal: bool, levels: int) -> None:
        """Draft and accept, as ever; what is accepted is evicted and merged token by token."""
        self.speculate(data, seed, equal=equal, levels=levels)
        self.check_kept()

    def check_kept(self) -> None:
        """The tokens kept are those of the plans, head by head."""
        session, plain = self.pairs[self.current]
        if not isinstance(plain, PlainPolicySession):
            raise TypeError("this machine compares with a PlainPolicySession")
        for row, sequences in enumerate(session._batch.rows):  # noqa: SLF001 - slots have no other face
            for layer, held in enumerate(sequences):
                if isinstance(held, WindowSequence):
                    continue
                right = plain.slots[row][layer].positions.numpy()
                mine = np.sort(np.broadcast_to(positions_of(held), right.shape), axis=1)
                if not np.array_equal(mine, right):
                    raise AssertionError(
                        f"row {row}, layer {layer} holds tokens {mine.tolist()}, planned are {right.tolist()}"
                    )
