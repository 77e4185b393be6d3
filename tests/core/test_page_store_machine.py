"""A page store under any order of its operations, on disks that fail: every page reads back, every byte is counted."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.core.pages import HOST, NVME
from kvtier.core.policy import IntArray
from kvtier.errors import CapacityError, StorageError
from kvtier.testing.page_stores import NumberedPages

FRAMES, HOST_PAGES, NVME_PAGES = 14, 10, 16


class PageStoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-test-"))
        self.pages = NumberedPages(FRAMES, host=HOST_PAGES, nvme=NVME_PAGES, directory=self.directory)
        self.owned: list[IntArray] = []

    @contextlib.contextmanager
    def may_fail(self) -> Iterator[None]:
        """Full tiers and failing disks are errors of their kind; what they leave behind is checked elsewhere."""
        try:
            yield
        except (CapacityError, StorageError) as error:
            note(f"{type(error).__name__}: {error}")

    def some(self, data: st.DataObject) -> IntArray:
        live = sorted({page for pages in self.owned for page in pages.tolist()})
        chosen = data.draw(st.lists(st.sampled_from(live), unique=True, min_size=1, max_size=12))
        return np.array(chosen, dtype=np.int64)

    @rule(columns=st.integers(1, 4), heads=st.integers(1, 3))
    def new(self, columns: int, heads: int) -> None:
        """There is room as long as all tiers together have some, whatever copies they hold."""
        self.pages.store.tick()
        fits = self.pages.store.table.live + columns * heads <= FRAMES + HOST_PAGES + NVME_PAGES
        try:
            self.owned.append(self.pages.new(columns, heads=heads).ravel())
        except CapacityError:
            assert not fits
        except StorageError as error:
            note(str(error))

    @rule()
    def tick(self) -> None:
        self.pages.store.tick()

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.pages.store.touch(self.some(data))

    @rule(count=st.integers(0, FRAMES))
    def demote(self, count: int) -> None:
        with self.may_fail():
            self.pages.store.demote(count, 0)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), batch=st.integers(1, 5))
    def promote(self, data: st.DataObject, batch: int) -> None:
        wanted = self.some(data)
        self.pages.store.tick()
        self.pages.store.touch(wanted)
        with self.may_fail():
            self.pages.store.promote(wanted, batch=batch)
            assert self.pages.store.resident(wanted).all()

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), most=st.integers(1, 8))
    def prefetch(self, data: st.DataObject, most: int) -> None:
        with self.may_fail():
            self.pages.store.prefetch(self.some(data), most=most)

    @rule(low_water=st.integers(1, FRAMES))
    def write_behind(self, low_water: int) -> None:
        self.pages.store.write_behind(low_water)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.owned))
        self.pages.store.table.retain(pages)
        self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(index=st.integers(0, 20))
    def release(self, index: int) -> None:
        self.pages.store.release(self.owned.pop(index % len(self.owned)))

    @precondition(lambda self: self.pages.store.arena.slabs)
    @rule(index=st.integers(0, 20))
    def evacuate(self, index: int) -> None:
        with self.may_fail():
            self.pages.store.evacuate(index % self.pages.store.arena.slabs)

    @rule()
    def compact(self) -> None:
        self.pages.store.compact()

    @rule(tier=st.sampled_from([HOST, NVME]), nth=st.integers(1, 2))
    def break_a_write(self, tier: int, nth: int) -> None:
        self.pages.faults[tier].fail_write(nth)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        assert self.pages.wrong(self.some(data)) == []

    @rule()
    def check_all(self) -> None:
        live = np.array(sorted({page for pages in self.owned for page in pages.tolist()}), dtype=np.int64)
        assert self.pages.uncounted() == []
        assert self.pages.wrong_copies() == []
        if live.size:
            assert self.pages.wrong(live) == []

    @invariant()
    def references_and_budget_hold(self) -> None:
        store = self.pages.store
        counts = np.zeros_like(store.table.refs)
        for pages in self.owned:
            counts[pages] += 1
        assert np.array_equal(counts, store.table.refs)
        assert self.pages.ledger.peak <= FRAMES * store.arena.frame_bytes
        assert all(backend.used_slots <= backend.capacity_slots for backend in self.pages.meters.values())

    def teardown(self) -> None:
        try:
            self.check_all()
            for pages in self.owned:
                self.pages.store.release(pages)
            assert self.pages.store.table.live == 0
            assert self.pages.uncounted() == []
        finally:
            self.pages.close()
            shutil.rmtree(self.directory)


TestPageStoreMachine = PageStoreMachine.TestCase
