"""An arena under any order of its operations equals a dict from frame to contents."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.core.arena import Arena
from kvtier.core.ledger import Ledger
from kvtier.core.policy import IntArray
from kvtier.types import LayerLayout

LAYER = LayerLayout(num_query_heads=1, num_kv_heads=1, key_dim=2, value_dim=1, dtype="float64")
PAGE = 2
LIMIT_FRAMES = 60


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger("cpu", None)
        self.arena = Arena(LAYER, PAGE, torch.device("cpu"), self.ledger)
        self.held: dict[int, float] = {}
        self.total = 0
        self.serial = 0.0

    @precondition(lambda self: self.total < LIMIT_FRAMES)
    @rule(frames=st.integers(1, 12))
    def grow(self, frames: int) -> None:
        self.arena.grow(frames)
        self.total += frames

    @precondition(lambda self: self.total > len(self.held))
    @rule(heads=st.integers(1, 3), share=st.floats(0, 1), spare=st.integers(0, 3))
    def allocate(self, heads: int, share: float, spare: int) -> None:
        columns = int(share * ((self.total - len(self.held)) // heads))
        frames = self.arena.allocate(heads, columns, spare=spare)
        assert frames.shape == (heads, columns)
        self._hold(frames)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), columns=st.integers(1, 3))
    def extend(self, data: st.DataObject, columns: int) -> None:
        last = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=2, unique=True))
        frames = self.arena.extend(np.array(last, dtype=np.int64), columns)
        if frames is not None:
            assert (frames - np.array(last)[:, None] == np.arange(1, columns + 1)).all()
            self._hold(frames)

    def _hold(self, frames: IntArray) -> None:
        assert not self.held.keys() & set(frames.ravel().tolist()), "a frame in use was given out"
        serials = self.serial + torch.arange(frames.size, dtype=torch.float64) + 1
        self.serial += frames.size
        page = serials[:, None, None].expand(-1, PAGE, 1)
        self.arena.write(frames.ravel(), page.expand(-1, PAGE, 2), -page)
        self.held.update(zip(frames.ravel().tolist(), serials.tolist(), strict=True))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        gone = data.draw(st.sets(st.sampled_from(sorted(self.held)), min_size=1))
        self.arena.release(np.array(sorted(gone), dtype=np.int64))
        for frame in gone:
            del self.held[frame]

    @rule()
    def drop_empty_slabs(self) -> None:
        for index in self.arena.empty_slabs():
            first, stop = self.arena.bounds(index)
            assert not any(first <= frame < stop for frame in self.held)
            self.arena.drop(index)
            self.total -= stop - first

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def repack(self, data: st.DataObject) -> None:
        frames = np.array(data.draw(st.permutations(sorted(self.held))), dtype=np.int64)
        moved = self.arena.repack(frames)
        self.held = dict(zip(moved.tolist(), [self.held[frame] for frame in frames.tolist()], strict=True))
        assert len(self.held) == frames.size, "two pages were moved to one frame"
        self.total = frames.size

    @invariant()
    def frames_and_bytes_are_counted(self) -> None:
        assert self.arena.total_frames == self.total
        assert self.arena.free_frames == self.total - len(self.held)
        assert self.ledger.in_use == self.total * self.arena.frame_bytes

    @invariant()
    def contents_are_kept(self) -> None:
        frames = np.array(sorted(self.held), dtype=np.int64)
        keys, values = self.arena.read(frames)
        expected = torch.tensor([self.held[frame] for frame in frames.tolist()], dtype=torch.float64)
        assert torch.equal(keys, expected[:, None, None].expand(-1, PAGE, 2))
        assert torch.equal(values, -expected[:, None, None].expand(-1, PAGE, 1))


TestArenaMachine = ArenaMachine.TestCase
