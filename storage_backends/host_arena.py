"""Host memory for records: units of some KiB in two parts, one of which can be lent to live sessions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvtier.errors import ConfigError
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.extents import copy_vectors
from kvtier.storage_backends.host import HostSlots, Span, spans_of
from kvtier.storage_backends.memory import PAGE_BYTES, ByteRows, round_up
from kvtier.types import format_bytes

__all__ = ["HostArena", "Place"]

_MAX_UNITS = 1 << 20  # finding room scans the units: a millisecond for this many


class Place(NamedTuple):
    """Units of one part, as spans in order; none for no bytes."""

    part: HostSlots
    spans: tuple[Span, ...]

    @property
    def units(self) -> int:
        """How many."""
        return sum(stop - first for first, stop in self.spans)

    @property
    def views(self) -> list[ByteRows]:
        """Their memory as flat vectors in order; it lasts as long as they are used, whatever becomes of the part."""
        return self.part.views(self.spans)


class HostArena:
    """Places of any size within two bounds. Not thread-safe: the owner holds a lock.

    Units are 4 KiB, or larger where the capacity is more than 4 GiB. A place lies in one part, side by side where that
    is free, else in pieces.

    Parameters
    ----------
    kept_bytes, lendable_bytes : int
        Bounds of the two parts; the second may be 0.

    Attributes
    ----------
    kept : HostSlots
        The part that is never lent.
    lendable_from : int
        Number of the first unit of the other.

    Raises
    ------
    ConfigError
        A part that is kept and holds no unit.
    """

    def __init__(self, kept_bytes: int, lendable_bytes: int) -> None:
        self.unit_bytes = max(PAGE_BYTES, round_up(-(-(kept_bytes + lendable_bytes) // _MAX_UNITS), PAGE_BYTES))
        self._lendable_units = HostSlots.slots_within(self.unit_bytes, lendable_bytes)
        kept_units = HostSlots.slots_within(self.unit_bytes, kept_bytes)
        if kept_units < 1:
            raise ConfigError(
                f"host memory for records must be at least {format_bytes(self.unit_bytes)}, "
                f"got {format_bytes(kept_bytes)}"
            )
        self.kept = HostSlots(self.unit_bytes, kept_units)
        self.lendable_from = kept_units
        self._lendable: HostSlots | None = None
        self.take_back()

    @property
    def held_bytes(self) -> int:
        """Bytes held from the system."""
        return sum(part.allocated_bytes for part in self._parts())

    @property
    def capacity_bytes(self) -> int:
        """The bound of the parts that are here."""
        return sum(part.capacity_bytes for part in self._parts())

    def free_units(self) -> dict[HostSlots, int]:
        """Free units of each part."""
        return {part: part.free_slots for part in self._parts()}

    def reserve(self, nbytes: int) -> Place:
        """Take a place.

        Raises
        ------
        CapacityError
            No part has the room, or the system has no such memory.
        """
        count = self.units_for(nbytes)
        part = next((part for part in self._parts() if part.free_slots >= count), self.kept)
        return Place(part, tuple(spans_of(part.reserve(count))))

    def release(self, place: Place) -> None:
        """Give a place back."""
        if place.spans and not self.is_gone(place):
            place.part.release(np.concatenate([np.arange(first, stop) for first, stop in place.spans]))

    def units_for(self, nbytes: int) -> int:
        """Units that a place takes."""
        return -(-nbytes // self.unit_bytes)

    def number_of(self, place: Place) -> int:
        """Number of a place's first unit, counted through both parts."""
        first = place.spans[0].first if place.spans else 0
        return first if place.part is self.kept else first + self.lendable_from

    def part_of(self, number: int) -> HostSlots:
        """The part in which the unit of a number lies, which is there."""
        return self.kept if self._lendable is None or number < self.lendable_from else self._lendable

    def place_of(self, number: int, count: int) -> Place:
        """The place of ``count`` units side by side from a number on."""
        part = self.part_of(number)
        first = number if part is self.kept else number - self.lendable_from
        return Place(part, (Span(first, first + count),) if count else ())

    def views(self, number: int, nbytes: int) -> list[ByteRows]:
        """The memory of so many bytes, in whole units, that lie side by side from the unit of a number on."""
        part = self.part_of(number)
        first = number if part is self.kept else number - self.lendable_from
        count = self.units_for(nbytes)
        return part.views([(first, first + count)]) if count else []

    def is_gone(self, place: Place) -> bool:
        """Whether the part of a place was lent or closed."""
        return place.part not in self._parts()

    def lend(self) -> None:
        """Give the lendable part up, in which no place is left; places there go with it."""
        if self._lendable is not None:
            self._lendable.close()
            self._lendable = None

    def take_back(self) -> None:
        """Have the lendable part again."""
        if self._lendable is None and self._lendable_units:
            self._lendable = HostSlots(self.unit_bytes, self._lendable_units)

    def moved(self, place: Place) -> Place:
        """Copy a place into the part that is kept; the old one stays.

        Raises
        ------
        CapacityError
            There is no room.
        """
        copy = Place(self.kept, tuple(spans_of(self.kept.reserve(place.units))))
        copy_vectors(place.views, copy.views)
        return copy

    def capabilities(self) -> Capabilities:
        """Those of the part that is kept."""
        return self.kept.capabilities()

    def close(self) -> None:
        """Give everything back; views keep their memory."""
        self.lend()
        self._lendable_units = 0
        self.kept.close()

    def _parts(self) -> list[HostSlots]:
        return [self.kept] if self._lendable is None else [self.kept, self._lendable]
