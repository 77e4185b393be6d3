"""The ledger: bytes by purpose, a limit that is never passed, and help from the tiers before it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.ledger import Ledger
from kvtier.errors import CapacityError


def test_bytes_are_counted_by_purpose() -> None:
    ledger = Ledger("cpu", None)
    ledger.take("pages", 100)
    ledger.take("tails", 30)
    ledger.take("pages", 5)
    ledger.give("tails", 30)

    assert (ledger.in_use, ledger.peak) == (105, 135)
    assert dict(ledger.by_purpose) == {"pages": 105, "tails": 0}
    assert ledger.describe() == "pages 105 B"


def test_an_empty_ledger_describes_nothing() -> None:
    assert Ledger("cpu", None).describe() == "nothing"


def test_the_limit_may_be_reached_and_not_passed() -> None:
    ledger = Ledger("cuda:3", 2048)
    ledger.take("pages", 2048)
    assert not ledger.fits(1)

    with pytest.raises(CapacityError, match=r"2\.0 KiB on cuda:3 .* 1 B more for tails .* \(pages 2\.0 KiB\)"):
        ledger.take("tails", 1)

    assert (ledger.in_use, ledger.peak, ledger.by_purpose["tails"]) == (2048, 2048, 0)


def test_without_a_limit_everything_fits() -> None:
    ledger = Ledger("cpu", None)

    assert ledger.fits(1 << 60)
    assert ledger.page_room() is None


def test_the_tiers_are_asked_before_an_allocation_is_refused() -> None:
    ledger = Ledger("cpu", 100)
    ledger.take("pages", 90)
    asked: list[int] = []

    def reclaim(nbytes: int) -> None:
        asked.append(nbytes)
        ledger.give("pages", 40)

    ledger.reclaim = reclaim
    ledger.take("tails", 10)
    assert asked == [], "what fits needs no help"
    ledger.take("tails", 35)

    assert asked == [35]
    assert (ledger.in_use, ledger.peak) == (95, 100)


def test_a_reclaim_that_frees_too_little_is_refused_and_its_work_counted() -> None:
    ledger = Ledger("cpu", 100)
    ledger.take("pages", 90)
    ledger.reclaim = lambda _: ledger.give("pages", 1)

    with pytest.raises(CapacityError):
        ledger.take("tails", 20)

    assert ledger.in_use == 89


@pytest.mark.parametrize(
    ("reserved", "others", "room"),
    [(0, 0, 700), (50, 0, 650), (50, 20, 650), (50, 80, 620)],
    ids=["none", "reserved", "reserved and partly used", "more used than reserved"],
)
def test_pages_leave_room_for_what_is_expected(reserved: int, others: int, room: int) -> None:
    ledger = Ledger("cpu", 1000)
    ledger.take("pages", 300)
    ledger.take("tails", others)
    ledger.reserved = reserved

    assert ledger.page_room() == room


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), max_size=40))
def test_counts_equal_a_sum_and_the_peak_its_maximum(requests: list[tuple[str, int]]) -> None:
    ledger = Ledger("cpu", 200)
    held: list[tuple[str, int]] = []
    peak = 0
    for purpose, nbytes in requests:
        total = sum(size for _, size in held)
        if total + nbytes <= 200:
            ledger.take(purpose, nbytes)
            held.append((purpose, nbytes))
            peak = max(peak, total + nbytes)
        else:
            with pytest.raises(CapacityError):
                ledger.take(purpose, nbytes)
            ledger.give(*held.pop(0))
        assert ledger.in_use == sum(size for _, size in held)
        assert ledger.peak == peak
        for name in "abc":
            assert ledger.by_purpose[name] == sum(size for owner, size in held if owner == name)
