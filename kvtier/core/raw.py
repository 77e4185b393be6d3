"""The model's own K and V of the layers that have not attended yet: counted, since they live beside what is held."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.core.ledger import Ledger

__all__ = ["RawTokens"]

_PURPOSE = "raw"


class RawTokens:
    """Bytes of the tensors that a session was given, by layer, until it has attended.

    Parameters
    ----------
    ledgers : sequence of Ledger
        That of each layer's device.
    """

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self._ledgers = ledgers
        self._held: dict[int, int] = {}

    def hold(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Count these tensors in place of the last of this layer.

        Raises
        ------
        CapacityError
            When they do not fit.
        """
        self.drop(layer)
        nbytes = keys.nbytes + values.nbytes
        self._ledgers[layer].take(_PURPOSE, nbytes)
        self._held[layer] = nbytes

    def drop(self, layer: int) -> None:
        """Those of a layer are gone."""
        nbytes = self._held.pop(layer, 0)
        if nbytes:
            self._ledgers[layer].give(_PURPOSE, nbytes)

    def drop_all(self) -> None:
        """All are gone."""
        for layer in list(self._held):
            self.drop(layer)
