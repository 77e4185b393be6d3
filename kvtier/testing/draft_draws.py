"""Random trees of drafted tokens, and paths in them, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from kvtier.core.draft_tree import DraftTree

__all__ = ["draw_path", "draw_tree"]


def draw_tree(data: st.DataObject, rows: int, *, most: int, behind: Sequence[int] | None = None) -> DraftTree:
    """A tree for each row, of ``most`` tokens at most and of 1 in some row, after ``behind[b]`` that row b has."""
    held = [0] * rows if behind is None else behind
    sizes = [data.draw(st.integers(int(row == 0), most), label="tokens") for row in range(rows)]
    each = []
    for before, size in zip(held, sizes, strict=True):
        draws = [data.draw(st.integers(0, before + own), label="parent") for own in range(size)]
        each.append([None if parent == 0 else parent - 1 for parent in draws])
    return DraftTree.of(each)


def draw_path(data: st.DataObject, parents: Sequence[int | None]) -> list[int]:
    """A path in a tree of one row, perhaps of no token."""
    path: list[int] = []
    above = None
    while data.draw(st.integers(0, 4), label="further"):
        below = [token for token, parent in enumerate(parents) if parent == above]
        if not below:
            break
        above = data.draw(st.sampled_from(below), label="token")
        path.append(above)
    return path
