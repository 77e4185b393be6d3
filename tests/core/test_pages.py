"""The page table: ids are given once, references counted, and unused ids come back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.pages import DEVICE, HOST, NVME, PageTable


def test_new_pages_have_one_reference_and_no_copy() -> None:
    table = PageTable()

    pages = table.allocate(2, 3)

    assert pages.shape == (2, 3)
    assert pages.T.ravel().tolist() == sorted(pages.ravel().tolist()), "ids ascend with the column first"
    assert (table.refs[pages] == 1).all()
    assert not table.copy[:, pages].any()
    assert not table.busy[pages].any()
    assert table.live == 6


def test_pages_are_gone_when_nobody_holds_them() -> None:
    table = PageTable()
    pages = table.allocate(1, 3)
    table.retain(pages[:, :2])

    assert table.drop(pages).tolist() == pages[0, 2:].tolist()
    assert table.drop(pages[:, :2]).tolist() == pages[0, :2].tolist()
    assert table.live == 0


def test_copies_outlive_the_last_reference_until_forgotten() -> None:
    table = PageTable()
    pages = table.allocate(1, 2)
    table.copy[HOST, pages] = True

    gone = table.drop(pages)
    assert table.copy[HOST, gone].all(), "the caller frees the copies first"
    table.forget(gone)

    assert not table.copy[:, gone].any()
    assert set(table.allocate(1, 2).ravel().tolist()) == set(gone.tolist())


def test_the_tiers_are_in_order_of_speed() -> None:
    assert (DEVICE, HOST, NVME) == (0, 1, 2)
    assert PageTable().copy.shape[0] == 3


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("allocate"), st.integers(1, 3), st.integers(0, 90)),
            st.tuples(st.just("retain"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
        ),
        max_size=30,
    )
)
def test_references_are_those_of_a_dict(steps: list[tuple[str, int, int]]) -> None:
    table = PageTable()
    owned: list[list[int]] = []
    counts: dict[int, int] = {}
    for action, number, columns in steps:
        if action == "allocate":
            pages = table.allocate(number, columns).ravel().tolist()
            assert not counts.keys() & set(pages), "an id in use was given out"
            assert len(set(pages)) == len(pages)
            counts.update(dict.fromkeys(pages, 1))
            owned.append(pages)
        elif owned and action == "retain":
            pages = owned[number % len(owned)]
            table.retain(np.array(pages, dtype=np.int64))
            for page in pages:
                counts[page] += 1
            owned.append(pages)
        elif owned:
            pages = owned.pop(number % len(owned))
            for page in pages:
                counts[page] -= 1
            gone = table.drop(np.array(pages, dtype=np.int64))
            assert sorted(gone.tolist()) == sorted(page for page in pages if not counts[page])
            table.forget(gone)
            counts = {page: count for page, count in counts.items() if count}
        assert {int(page): int(table.refs[page]) for page in np.flatnonzero(table.refs)} == counts
        assert table.live == len(counts)
