"""Keys and values on their way from the cache's ``update`` to the attention function, one pair per thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from kvtier.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from kvtier.integrations.hf.state import CacheState

__all__ = ["Staged", "stage"]


class Staged(NamedTuple):
    """What ``update`` was given: key [B, Hk, Tq, Dk] and value [B, Hk, Tq, Dv] of one layer."""

    state: CacheState
    layer: int
    key: torch.Tensor
    value: torch.Tensor


class _Stage(threading.local):
    """Holds at most one pair: a layer attends right after it updates the cache, on the same thread."""

    _held: Staged | None = None

    def put(self, staged: Staged) -> None:
        """Hold a pair for the attention function.

        Raises
        ------
        UnsupportedModelError
            When the pair before was never attended to: the model does not attend through kvtier.
        """
        if self._held is not None:
            layer = self._held.layer
            self.clear()
            raise UnsupportedModelError(
                f"layer {layer} put its keys into a kvtier cache and then did not attend through kvtier; "
                "give handle.new_cache() only to the model that the handle patched"
            )
        self._held = staged

    def take(self) -> Staged | None:
        """Hand over what is held, if anything."""
        held, self._held = self._held, None
        return held

    def clear(self) -> None:
        """Forget what a forward that failed left behind."""
        self._held = None


stage = _Stage()
