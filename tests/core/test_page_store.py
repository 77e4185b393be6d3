"""Pages over device, host and NVMe: every tier returns the bytes it was given, and nothing is written twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.core.pages import DEVICE, HOST, NVME
from kvtier.core.policy import IntArray
from kvtier.errors import CapacityError
from kvtier.testing.page_stores import NumberedPages


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[NumberedPages]:
    """Ten frames, eight pages on the host, twenty in a file."""
    with NumberedPages(10, host=8, nvme=20, directory=tmp_path) as opened:
        yield opened


def tiers_of(pages: NumberedPages, ids: IntArray) -> list[set[int]]:
    copy = pages.store.table.copy
    return [{tier for tier in (DEVICE, HOST, NVME) if copy[tier][page]} for page in ids.ravel().tolist()]


def push_down(pages: NumberedPages, ids: IntArray) -> None:
    """Demote these pages, as older than all others."""
    store = pages.store
    store.tick()
    store.table.last_use[ids.ravel()] = 0
    store.demote(ids.size, ids.size)


def test_new_pages_are_on_the_device_and_nowhere_else(pages: NumberedPages) -> None:
    made = pages.new(3)

    assert tiers_of(pages, made) == [{DEVICE}] * 6
    assert pages.store.resident(made).all()
    assert pages.wrong(made.ravel()) == []
    assert pages.uncounted() == []


@pytest.mark.parametrize(("host", "nvme", "tier"), [(8, 0, HOST), (0, 8, NVME)], ids=["host", "nvme"])
def test_pages_come_back_from_each_tier_as_they_left(tmp_path: Path, host: int, nvme: int, tier: int) -> None:
    with NumberedPages(8, host=host, nvme=nvme, directory=tmp_path) as pages:
        made = pages.new(4).ravel()
        push_down(pages, made)

        assert tiers_of(pages, made) == [{tier}] * 8
        assert pages.wrong(made[[5, 0, 3]]) == [], "read in any order"
        pages.store.promote(made, batch=3)

        assert tiers_of(pages, made) == [{DEVICE, tier}] * 8
        assert pages.wrong(made) == []
        assert pages.uncounted() == []


def test_one_read_gathers_pages_of_all_tiers_in_the_order_asked(pages: NumberedPages) -> None:
    first = pages.new(4).ravel()
    push_down(pages, first)
    second = pages.new(4).ravel()
    push_down(pages, second)
    third = pages.new(1).ravel()

    assert tiers_of(pages, first) == [{NVME}] * 8, "the oldest moved on to make room on the host"
    assert tiers_of(pages, second) == [{HOST}] * 8
    mixed = np.stack([first[:2], second[:2], third]).T.ravel()
    assert pages.wrong(mixed) == []
    assert pages.wrong(mixed[::-1]) == []
    keys, values = pages.store.read_behind(mixed).result(timeout=10)
    assert torch.equal(keys, pages.expected(mixed)[0])
    assert torch.equal(values, pages.expected(mixed)[1])


def test_a_page_with_a_copy_below_leaves_without_being_written_again(pages: NumberedPages) -> None:
    made = pages.new(4).ravel()
    push_down(pages, made)
    pages.store.promote(made, batch=8)
    written = pages.meters[HOST].meters.write.bytes
    push_down(pages, made)

    assert pages.meters[HOST].meters.write.bytes == written == 8 * pages.store.arena.frame_bytes
    assert tiers_of(pages, made) == [{HOST}] * 8
    assert pages.wrong(made) == []


def test_write_behind_and_then_demote_writes_once(pages: NumberedPages) -> None:
    made = pages.new(5).ravel()
    pages.store.tick()
    pages.store.write_behind(4)
    pages.store.settle()
    ahead = [page for page in made.tolist() if pages.store.table.copy[HOST][page]]

    assert len(ahead) == 4
    assert pages.store.resident(made).all(), "pages copied ahead stay on the device"
    pages.store.demote(4, 4)

    assert [page for page in made.tolist() if not pages.store.resident(np.array(page))] == ahead
    assert pages.meters[HOST].meters.write.bytes == 4 * pages.store.arena.frame_bytes
    assert pages.store.lower.traffic.written == 4 * pages.store.arena.frame_bytes
    assert pages.wrong(made) == []
    assert pages.uncounted() == []


def test_write_behind_waits_until_frames_are_few(pages: NumberedPages) -> None:
    pages.new(2)
    pages.store.arena.grow(3)
    pages.store.tick()
    pages.store.write_behind(3)
    pages.store.settle()

    assert pages.meters[HOST].meters.write.ops == 0


def test_pages_of_this_step_are_not_copied_ahead(pages: NumberedPages) -> None:
    pages.new(5)
    pages.store.write_behind(4)
    pages.store.settle()

    assert pages.meters[HOST].meters.write.ops == 0


def test_prefetch_brings_what_fits_and_reads_it_once(pages: NumberedPages) -> None:
    made = pages.new(4).ravel()
    push_down(pages, made)
    pages.store.prefetch(made, most=5)
    pages.store.settle()

    assert pages.store.resident(made).sum() == 5
    assert pages.meters[HOST].meters.read.bytes == 5 * pages.store.arena.frame_bytes
    assert pages.store.lower.traffic.promoted == 5 * pages.store.arena.frame_bytes
    assert pages.wrong(made) == []
    assert pages.uncounted() == []


def test_pages_on_their_way_are_not_fetched_again(pages: NumberedPages) -> None:
    made = pages.new(4).ravel()
    push_down(pages, made)
    pages.faults[HOST].slow_down(0.05)
    pages.store.prefetch(made, most=8)
    pages.store.prefetch(made, most=8)
    pages.store.promote(made, batch=8)

    assert pages.meters[HOST].meters.read.bytes == 8 * pages.store.arena.frame_bytes
    assert pages.wrong(made) == []
    assert pages.uncounted() == []


def test_prefetch_never_fails(tmp_path: Path) -> None:
    with NumberedPages(4, host=4, directory=tmp_path) as pages:
        low = pages.new(2).ravel()
        push_down(pages, low)
        high = pages.new(2).ravel()
        pages.store.prefetch(low, most=4)
        pages.store.settle()

        assert pages.wrong(np.concatenate([low, high])) == []
        assert pages.uncounted() == []


def test_released_pages_are_freed_in_every_tier(pages: NumberedPages) -> None:
    low = pages.new(4).ravel()
    push_down(pages, low)
    high = pages.new(4).ravel()
    pages.store.promote(low[:2], batch=2)
    pages.store.prefetch(low[2:4], most=2)
    pages.store.release(low)
    pages.store.release(high)

    assert pages.store.table.live == 0
    assert pages.store.arena.free_frames == pages.store.arena.total_frames
    assert pages.meters[HOST].used_slots == pages.meters[NVME].used_slots == 0


def test_a_page_held_twice_survives_the_first_release(pages: NumberedPages) -> None:
    made = pages.new(2).ravel()
    pages.store.table.retain(made[:1])
    pages.store.release(made)

    assert pages.store.table.live == 1
    assert pages.wrong(made[:1]) == []
    assert pages.uncounted() == []


def test_evacuating_a_slab_moves_every_page_below(pages: NumberedPages) -> None:
    first, second = pages.new(2).ravel(), pages.new(3).ravel()
    assert pages.store.arena.slabs == 2
    pages.store.evacuate(0)

    assert pages.store.arena.slabs == 1
    assert tiers_of(pages, first) == [{HOST}] * 4
    assert tiers_of(pages, second) == [{DEVICE}] * 6
    assert pages.wrong(np.concatenate([first, second])) == []
    assert pages.uncounted() == []


def test_compaction_gives_back_what_is_free(tmp_path: Path) -> None:
    with NumberedPages(20, host=8, directory=tmp_path) as pages:
        first, second = pages.new(2).ravel(), pages.new(5).ravel()
        pages.store.release(first)
        pages.store.release(second[2:])
        pages.store.compact()

        assert pages.store.arena.total_frames == 2
        assert pages.wrong(second[:2]) == []
        assert pages.uncounted() == []


def test_scattered_pages_are_joined_into_one_run(tmp_path: Path) -> None:
    with NumberedPages(24, host=4, directory=tmp_path) as pages:
        made = [pages.new(1) for _ in range(6)]
        pages.store.arena.grow(8)
        scattered = np.concatenate(made[::2], axis=1)
        assert len(pages.store.arena.places(pages.store.frames(scattered))[0]) == 3
        before = pages.store.arena.version

        assert pages.store.join(scattered)

        assert len(pages.store.arena.places(pages.store.frames(scattered))[0]) == 1
        assert pages.store.arena.version > before, "views of the old frames must go stale"
        assert pages.wrong(np.concatenate([page.ravel() for page in made])) == []
        assert pages.uncounted() == []


def test_pages_are_not_joined_without_a_free_run(pages: NumberedPages) -> None:
    made = [pages.new(1) for _ in range(5)]
    scattered = np.concatenate(made[::2], axis=1)
    frames = pages.store.frames(scattered).copy()

    assert not pages.store.join(scattered)

    assert np.array_equal(pages.store.frames(scattered), frames)
    assert pages.uncounted() == []


def test_pages_of_this_step_may_not_leave(pages: NumberedPages) -> None:
    made = pages.new(5).ravel()
    pages.store.tick()
    pages.store.touch(made[:7])

    with pytest.raises(CapacityError, match="needs 4 page frames more on cpu: 10 are held, 3 of them may leave"):
        pages.new(2)

    assert pages.store.resident(made).all()
    assert pages.wrong(made) == []


def test_fewer_pages_leave_than_usual_when_that_is_all_there_is_room_for(tmp_path: Path) -> None:
    with NumberedPages(64, host=1, directory=tmp_path) as pages:
        made = pages.new(32).ravel()
        pages.store.tick()
        one = pages.new(1, heads=1)

        assert pages.store.resident(made).sum() == 63, "two would have left, had there been room"
        assert pages.wrong(np.concatenate([made, one.ravel()])) == []
        assert pages.uncounted() == []


@pytest.mark.parametrize(("host", "nvme"), [(6, 0), (0, 6), (3, 3)], ids=["host", "nvme", "both"])
def test_copies_of_pages_on_the_device_make_room_for_pages_that_have_none(tmp_path: Path, host: int, nvme: int) -> None:
    with NumberedPages(6, host=host, nvme=nvme, directory=tmp_path) as pages:
        low = pages.new(3).ravel()
        push_down(pages, low)
        pages.store.promote(low[:4], batch=4)
        high = pages.new(1).ravel()
        assert [backend.free_slots for backend in pages.meters.values()] == [0] * len(pages.meters)
        pages.store.tick()
        pages.store.touch(low[:4])
        pages.new(1)

        assert pages.store.resident(low[:4]).all()
        assert pages.wrong(np.concatenate([low, high])) == []
        assert pages.uncounted() == []


@pytest.mark.parametrize("nvme", [0, 4])
def test_without_room_below_all_pages_stay_readable(tmp_path: Path, nvme: int) -> None:
    with NumberedPages(6, host=6, nvme=nvme, directory=tmp_path) as pages:
        made = []
        for _ in range((12 + nvme) // 2):
            pages.store.tick()
            made.append(pages.new(1).ravel())
        pages.store.tick()
        with pytest.raises(CapacityError, match=r"must leave the device and .* are free below it \(host"):
            pages.new(1)

        assert pages.wrong(np.concatenate(made)) == []
        assert pages.uncounted() == []


def test_an_unbounded_device_never_moves_a_page(tmp_path: Path) -> None:
    with NumberedPages(None, host=4, directory=tmp_path) as pages:
        made = np.concatenate([pages.new(7).ravel() for _ in range(5)])
        pages.store.write_behind(100)

        assert pages.store.resident(made).all()
        assert pages.meters[HOST].meters.write.ops == 0
