"""What happened to the catalogue since the index last heard of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvtier.storage_backends.segment.rows import Rows

__all__ = ["Changes", "SegmentMark"]


class SegmentMark(NamedTuple):
    """How far the index covers one life of a segment."""

    epoch: int
    upto: int
    min_sequence: int


@dataclass(slots=True)
class Changes:
    """Rows to add and graves to dig, in order.

    Attributes
    ----------
    rows : list of Rows
        Arrays of `ROW`.
    graves : list of Rows
        Arrays of `GRAVE`: what was deleted or put aside.
    tombstones : list of (segment, offset)
        Where tombstones lie.
    dropped : list of int
        Segments whose life ended.
    tenants, namespaces : list of (int, bytes)
        New numbers and what they stand for.
    marks : dict
        Every cache segment and how far these changes cover it.
    sequence, epoch : int
        The next to be given out.
    """

    rows: list[Rows] = field(default_factory=list)
    graves: list[Rows] = field(default_factory=list)
    tombstones: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    tenants: list[tuple[int, bytes]] = field(default_factory=list)
    namespaces: list[tuple[int, bytes]] = field(default_factory=list)
    marks: dict[int, SegmentMark] = field(default_factory=dict)
    sequence: int = 1
    epoch: int = 1

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write but marks."""
        return not (self.rows or self.graves or self.dropped)
