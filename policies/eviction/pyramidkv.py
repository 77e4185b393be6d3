"""PyramidKV: SnapKV with more room in the first layers than in the last (Cai et al. 2024, arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtier.errors import PolicyError
from kvtier.policies.eviction.snapkv import SnapKV
from kvtier.types import KVLayout

__all__ = ["PyramidKV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidKV(SnapKV):
    """Evict as SnapKV does; the budgets of the layers fall in a straight line and sum to the budget times the layers.

    The published code floors the step between layers, so that its budgets do not sum up, and caps them by the length of
    the prompt; here the remainder goes to the layers that lost most by rounding, and a layer with room for all keeps
    all.

    Parameters
    ----------
    beta : int
        The last layer has this part of the tokens beside the window, and the first one the rest of twice as many.
    """

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "PyramidKV, Cai et al. 2024, arXiv 2406.02069, section 4"

    beta: int = 20

    def __post_init__(self) -> None:
        # A slotted dataclass is made anew, so super() without arguments would look for the class before it.
        SnapKV.__post_init__(self)
        if type(self.beta) is not int or self.beta < 1:
            raise PolicyError(f"pyramidkv: beta must be an integer of at least 1, got {self.beta!r}")

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """Tokens kept in each layer: the window and a share that falls with the layer."""
        uniform = SnapKV.allocate(self, layout, keep)
        steps = len(uniform) - 1
        if not steps:
            return uniform
        ranked = keep - self.window
        last = ranked // self.beta
        first = 2 * ranked - last
        shares = [divmod(first * steps - layer * (first - last), steps) for layer in range(len(uniform))]
        short = ranked * len(uniform) - sum(whole for whole, _ in shares)
        given = sorted(range(len(shares)), key=lambda layer: (-shares[layer][1], layer))[:short]
        return tuple(self.window + whole + (layer in given) for layer, (whole, _) in enumerate(shares))
