"""PyramidKV: SnapKV with more tokens in lower layers (Cai et al. 2024, arXiv 2406.02069, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtier.policies.eviction.budgets import at_least, share_out, whole
from kvtier.policies.eviction.snapkv import SnapKV
from kvtier.types import KVLayout

__all__ = ["PyramidKV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's votes under budgets that fall linearly from the first layer to the last.

    The last layer gets ``(keep - window) / beta`` tokens beside its window, the first twice the mean less that. The
    published code rounds every step down, so that layers sum to less than the budget; here they sum to it exactly.
    Sliding-window layers keep what they see and have no share.

    Parameters
    ----------
    beta : int
        How flat the top of the pyramid is: the larger, the less the last layers keep.
    """

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "PyramidKV, Cai et al. 2024, arXiv 2406.02069, section 3"

    beta: int = 20

    def __post_init__(self) -> None:
        SnapKV.__post_init__(self)
        whole(self.name, "beta", self.beta, 1)

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """Tokens kept in each layer, ``keep`` on average over the layers that see everything, never increasing."""
        at_least(self.name, keep, self.window, "window")
        full = [index for index, layer in enumerate(layout.layers) if layer.window is None]
        budgets = [keep] * len(layout.layers)
        top = (keep - self.window) / self.beta
        bottom = 2 * (keep - self.window) - top
        steps = max(len(full) - 1, 1)
        line = [bottom - (bottom - top) * place / steps for place in range(len(full))]
        if len(full) == 1:
            line = [1.0]
        # One token beside the window is the least that leaves something to choose.
        shares = share_out(line, (keep - self.window) * len(full), 1) if full else ()
        for index, share in zip(full, sorted(shares, reverse=True), strict=True):
            budgets[index] = self.window + share
        return tuple(budgets)
