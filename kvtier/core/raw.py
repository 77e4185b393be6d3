"""The model's own keys and values of a layer, which live from its append until it has attended: counted, not held."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.core.ledger import Ledger

__all__ = ["RawBytes"]

_PURPOSE = "raw"


class RawBytes:
    """Bytes by layer, in the ledgers of the layers' devices."""

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self._ledgers = ledgers
        self._held: dict[int, int] = {}

    def hold(self, layer: int, nbytes: int) -> None:
        """A layer appends ``nbytes``; those of its append before are gone.

        Raises
        ------
        CapacityError
            When the device has no room.
        """
        self.drop(layer)
        self._ledgers[layer].take(_PURPOSE, nbytes)
        self._held[layer] = nbytes

    def drop(self, layer: int) -> None:
        """The layer has attended."""
        nbytes = self._held.pop(layer, 0)
        if nbytes:
            self._ledgers[layer].give(_PURPOSE, nbytes)

    def clear(self) -> None:
        """Nothing is held any more."""
        for layer in list(self._held):
            self.drop(layer)
