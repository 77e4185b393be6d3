"""A tree of drafted tokens (speculative decoding): which token each one follows, and which paths may be accepted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvtier.errors import InputError
from kvtier.kernels.gather_attention.extras import MOST_DRAFTS

__all__ = ["DraftTree", "Parents", "RowTree", "TreePath", "rows_of_path"]

Parents: TypeAlias = Sequence[int | None]
"""Of each drafted token the number of the one it follows; None for one that follows the last token held."""

TreePath: TypeAlias = Sequence[int] | Sequence[Sequence[int]]
"""Numbers of drafted tokens from one without a parent downwards: of every row, or of each row its own."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Which token each newly drafted one follows; ``DraftTree.of`` makes it.

    Parameters
    ----------
    rows : tuple of tuple
        `Parents` of each row, or of all of them when there is one entry. Numbers count the drafted tokens of a row
        that are pending, older appends first, from 0.
    """

    rows: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of(cls, parents: DraftTree | Parents | Sequence[Parents]) -> DraftTree:
        """A tree for all rows, ``[None, 0, 0, 1]``, or one for each, ``[[None, 0], [None, None, 1]]``."""
        if isinstance(parents, DraftTree):
            return parents
        shared: list[int | None] = []
        own: list[tuple[int | None, ...]] = []
        for one in parents:
            if one is None:
                shared.append(None)
            elif isinstance(one, Sequence):
                own.append(tuple(None if each is None else operator.index(each) for each in one))
            else:
                shared.append(operator.index(one))
        if shared and own:
            raise InputError(f"parents must be one list of numbers, or one list for each row, got {list(parents)}")
        return cls(tuple(own) if own else (tuple(shared),))

    @property
    def tokens(self) -> int:
        """Columns that it takes: the tokens of the row that has most."""
        return max(map(len, self.rows), default=0)

    def of_rows(self, rows: int) -> tuple[tuple[int | None, ...], ...]:
        """The parents of each of ``rows`` rows.

        Raises
        ------
        InputError
            When the tree is for another number of rows, or has no token.
        """
        if len(self.rows) not in (1, rows):
            raise InputError(f"a draft needs one tree, or one for each of the {rows} rows, got {len(self.rows)} trees")
        if not self.tokens:
            raise InputError("a draft has at least 1 token, got an empty tree")
        return self.rows * rows if len(self.rows) == 1 else self.rows

    def spans(self, rows: int) -> tuple[slice, ...]:
        """The columns of each row that are tokens: its first ones; the rest is padding."""
        return tuple(slice(0, len(parents)) for parents in self.of_rows(rows))


@dataclass(frozen=True, slots=True)
class RowTree:
    """All drafted tokens of one row that are pending, numbered from 0 in the order they came.

    Attributes
    ----------
    parents : tuple
        The number of the token that each follows, or None.
    positions : tuple of int
        Where each stands; siblings share a position.
    ancestors : tuple of int
        Bit j of entry i is set when token i descends from token j, or is token j.
    columns : tuple of int
        Where each came, counted over all columns that were drafted.
    """

    parents: tuple[int | None, ...] = ()
    positions: tuple[int, ...] = ()
    ancestors: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @property
    def root(self) -> int | None:
        """Where the tokens stand that follow the last one held; None before any."""
        return self.positions[0] if self.positions else None

    def places(self, parents: Parents, root: int) -> list[int]:
        """Where new tokens with these ``parents`` stand, when those without a parent stand at ``root``.

        Raises
        ------
        InputError
            When a token follows one that does not come before it.
        """
        places = list(self.positions)
        for parent in parents:
            if parent is not None and not 0 <= parent < len(places):
                raise InputError(
                    f"drafted token {len(places)} must follow None, or one of those before it, got parent {parent}"
                )
            places.append(root if parent is None else places[parent] + 1)
        if len(places) > MOST_DRAFTS:
            raise InputError(f"at most {MOST_DRAFTS} tokens of a row are drafted at a time, got {len(places)}")
        return places[len(self.positions) :]

    def grown(self, parents: Parents, positions: Sequence[int], *, last: int | None, column: int) -> RowTree:
        """With new tokens, the first of them in drafted column ``column``, after a last token held at ``last``.

        Raises
        ------
        InputError
            When their positions are not those of their places in the tree.
        """
        if not parents:
            return self
        root = positions[0] if self.root is None else self.root
        required = self.places(parents, root)
        if list(positions) != required or (last is not None and root <= last):
            raise InputError(
                "a drafted token stands one behind the one it follows, or behind the last one held "
                f"(at {last}), got parents {list(parents)} at positions {list(positions)}"
            )
        ancestors = list(self.ancestors)
        for parent in parents:
            above = 0 if parent is None else ancestors[parent]
            ancestors.append(above | 1 << len(ancestors))
        return RowTree(
            (*self.parents, *parents),
            (*self.positions, *positions),
            tuple(ancestors),
            (*self.columns, *range(column, column + len(parents))),
        )

    def check_path(self, path: Sequence[int]) -> None:
        """Refuse what does not lead from a token without a parent downwards.

        Raises
        ------
        InputError
        """
        above = None
        for token in path:
            if not 0 <= token < len(self.parents) or self.parents[token] != above:
                raise InputError(
                    "a path leads from a drafted token without a parent to one that follows it, and so on, got "
                    f"{list(path)} in a tree of parents {list(self.parents)}"
                )
            above = token


def rows_of_path(path: TreePath, rows: int) -> list[list[int]]:
    """The path of each of ``rows`` rows.

    Raises
    ------
    InputError
        When there is not one for each row.
    """
    own = [list(map(operator.index, one)) for one in path if isinstance(one, Sequence)]
    shared = [operator.index(one) for one in path if not isinstance(one, Sequence)]
    if own and (shared or len(own) != rows):
        raise InputError(f"accept takes one path, or one for each of the {rows} rows, got {list(path)}")
    return own or [shared] * rows
