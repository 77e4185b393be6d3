"""Host memory for records: units of some KiB in two parts, one of which can be lent to live sessions."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.errors import ConfigError
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.extents import copy_vectors
from kvtier.storage_backends.host import HostSlots
from kvtier.storage_backends.memory import PAGE_BYTES, ByteRows, round_up
from kvtier.storage_backends.slots import IntArray
from kvtier.types import format_bytes

__all__ = ["HostArena", "Place"]

_MAX_UNITS = 1 << 20  # finding room scans the units: a millisecond for this many


@dataclass(slots=True, eq=False)
class Place:
    """Units of one part, and their memory as flat vectors in order."""

    part: HostSlots
    units: IntArray
    views: list[ByteRows]

    @property
    def nbytes(self) -> int:
        """Bytes, padding included."""
        return self.units.size * self.part.slot_bytes


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
        units = part.reserve(count)
        return Place(part, units, part.views(units))

    def release(self, place: Place) -> None:
        """Give a place back."""
        place.views = []
        if not self.is_gone(place):
            place.part.release(place.units)

    def units_for(self, nbytes: int) -> int:
        """Units that a place takes."""
        return -(-nbytes // self.unit_bytes)

    def is_lendable(self, place: Place) -> bool:
        """Whether a place lies in the part that can be lent."""
        return place.part is self._lendable

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
        units = self.kept.reserve(place.units.size)
        copy = Place(self.kept, units, self.kept.views(units))
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
