"""Small numbers for names that repeat in many records: tenants, namespaces."""

from __future__ import annotations

__all__ = ["Names"]


class Names:
    """Small numbers for values that repeat: tenants, namespaces."""

    def __init__(self) -> None:
        self.values: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._new: list[tuple[int, bytes]] = []

    def number(self, value: bytes) -> int:
        """Number of a value; the next free one when it is new."""
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self.values)
            self.values.append(value)
            self._new.append((number, value))
        return number

    def find(self, value: bytes) -> int | None:
        """Number of a value that is known."""
        return self._numbers.get(value)

    def take_new(self) -> list[tuple[int, bytes]]:
        """Numbers given out since the last call."""
        new, self._new = self._new, []
        return new

    def load(self, values: list[bytes]) -> None:
        """Start from numbers that the index knows."""
        self.values = list(values)
        self._numbers = {value: number for number, value in enumerate(values)}
