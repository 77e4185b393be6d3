"""Bad disks under a page store: a damaged page is lost loudly, a failed write loses nothing, never a wrong byte."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.pages import DEVICE, HOST, NVME
from kvtier.errors import DamagedSlotsError, PagesLostError, StorageError
from kvtier.testing.page_stores import NumberedPages


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[NumberedPages]:
    """Eight frames above a file of sixteen pages."""
    with NumberedPages(8, nvme=16, directory=tmp_path) as opened:
        yield opened


@pytest.fixture
def tall(tmp_path: Path) -> Iterator[NumberedPages]:
    """Six frames, four pages on the host, sixteen in a file."""
    with NumberedPages(6, host=4, nvme=16, directory=tmp_path) as opened:
        yield opened


@given(page=st.integers(0, 7), bit=st.integers(0, 160 * 8 - 1))
def test_any_flipped_bit_loses_its_page_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, page: int, bit: int
) -> None:
    with NumberedPages(8, nvme=8, directory=tmp_path_factory.mktemp("spill")) as pages:
        made = pages.new(4).ravel()
        pages.store.tick()
        pages.store.demote(8, 8)
        pages.faults[NVME].flip_bit(int(pages.store.table.slot[NVME][made[page]]), bit)

        with pytest.raises(PagesLostError, match=r"1 pages .* nvme tier do not match their digest; call handle\.rec"):
            pages.store.read(made)
        assert pages.wrong(np.delete(made, page)) == []
        assert pages.uncounted() == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "exchange", "lost write"])
def test_damage_is_an_error_and_never_a_wrong_byte(pages: NumberedPages, damage: str) -> None:
    if damage == "lost write":
        pages.faults[NVME].lose_write()
    made = pages.new(4).ravel()
    pages.store.tick()
    pages.store.demote(8, 8)
    slots = pages.store.table.slot[NVME][made]
    {
        "flip": lambda: pages.faults[NVME].flip_bit(int(slots[2]), 77),
        "truncate": lambda: pages.faults[NVME].truncate_slot(int(slots[2]), 8),
        "exchange": lambda: pages.faults[NVME].exchange_slots(int(slots[2]), int(slots[3])),
        "lost write": lambda: None,
    }[damage]()

    with pytest.raises(PagesLostError) as error:
        pages.store.promote(made, batch=8)

    assert isinstance(error.value.__cause__, DamagedSlotsError)
    assert not pages.store.resident(made).any(), "no damaged page may reach the device"
    assert pages.uncounted() == []


def test_a_read_that_fails_is_an_error_and_the_next_one_is_right(pages: NumberedPages) -> None:
    made = pages.new(4).ravel()
    pages.store.tick()
    pages.store.demote(8, 8)
    pages.faults[NVME].fail_read()

    with pytest.raises(PagesLostError, match=r"nvme tier cannot be read .*Input/output error"):
        pages.store.read(made)

    assert pages.wrong(made) == []


def test_a_short_read_is_an_error(pages: NumberedPages) -> None:
    made = pages.new(4).ravel()
    pages.store.tick()
    pages.store.demote(8, 8)
    pages.faults[NVME].short_read()

    with pytest.raises(PagesLostError):
        pages.store.read(made)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_write_leaves_the_pages_on_the_device(pages: NumberedPages, code: int) -> None:
    made = pages.new(4).ravel()
    pages.store.tick()
    pages.faults[NVME].fail_write(code=code)

    with pytest.raises(StorageError) as error:
        pages.store.demote(8, 8)

    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == code
    assert pages.store.resident(made).all()
    assert pages.meters[NVME].used_slots == 0
    assert pages.wrong(made) == []
    assert pages.uncounted() == []
    pages.store.demote(8, 8)
    assert pages.wrong(made) == [], "the next attempt succeeds"


def test_a_failed_spill_keeps_the_copies_on_the_host(tall: NumberedPages) -> None:
    first = tall.new(2).ravel()
    tall.store.tick()
    tall.store.demote(4, 4)
    second = tall.new(3).ravel()
    tall.store.tick()
    tall.faults[NVME].fail_write()

    with pytest.raises(StorageError):
        tall.store.demote(6, 6)

    assert tall.store.table.copy[HOST][first].all()
    assert tall.store.table.copy[DEVICE][second].all()
    assert tall.wrong(np.concatenate([first, second])) == []
    assert tall.uncounted() == []


def test_a_failed_copy_ahead_is_forgotten_and_tried_again(pages: NumberedPages) -> None:
    made = pages.new(4).ravel()
    pages.store.tick()
    pages.faults[NVME].fail_write()
    pages.store.write_behind(8)
    pages.store.settle()
    assert pages.meters[NVME].used_slots == 0
    assert pages.store.lower.traffic.written == 0
    assert not pages.store.table.busy.any()

    pages.store.write_behind(8)
    pages.store.settle()
    pages.store.demote(8, 8)

    assert pages.meters[NVME].meters.write.bytes == 8 * pages.store.arena.frame_bytes
    assert pages.wrong(made) == []
    assert pages.uncounted() == []


def test_a_failed_prefetch_is_forgotten_and_the_page_read_when_needed(pages: NumberedPages) -> None:
    made = pages.new(2).ravel()
    pages.store.tick()
    pages.store.demote(4, 4)
    pages.faults[NVME].fail_read()
    pages.store.prefetch(made, most=4)
    pages.store.settle()

    assert not pages.store.resident(made).any()
    assert pages.uncounted() == []
    pages.store.promote(made, batch=4)
    assert pages.wrong(made) == []
    assert pages.uncounted() == []


def test_a_damaged_page_with_a_copy_on_the_device_is_not_lost(pages: NumberedPages) -> None:
    made = pages.new(4).ravel()
    pages.store.tick()
    pages.store.write_behind(8)
    pages.store.settle()
    pages.faults[NVME].flip_bit(int(pages.store.table.slot[NVME][made[0]]), 3)

    assert pages.wrong(made) == []
