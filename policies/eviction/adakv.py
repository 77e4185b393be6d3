"""AdaKV: the KV heads of a layer share its budget by how their attention lies (Feng et al. 2024, arXiv 2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from kvtier.core.policy import KeepPlan
from kvtier.core.stats import SlotView
from kvtier.errors import PolicyError
from kvtier.policies.eviction.heads import share_heads
from kvtier.policies.eviction.pyramidkv import PyramidKV
from kvtier.policies.eviction.snapkv import SnapKV

__all__ = ["AdaKV", "AdaPyramidKV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaKV(SnapKV):
    """Score as SnapKV does and rank all KV heads of a layer together: a head whose attention is spread keeps more.

    ``Hk * keep`` tokens stay in a layer. Every head keeps its window and, as a safeguard, the part ``alpha`` of the
    rest of an even share. What is dropped is freed: heads have page lists of their own lengths.

    The published code counts how many of the best scores fall to each head, mixes that with the even share and rounds,
    so that a layer may miss its budget by some tokens; it takes one sequence at a time. kvpress takes the safeguard as
    it is here, but keeps all tensors and hides what is dropped behind keys that no query looks at.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head on average over the heads of a layer; None takes the session's ``keep``.
    alpha : float
        From 0 to 1: the part of its even share, beside the window, that a head keeps whatever the others score.
    """

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "AdaKV, Feng et al. 2024, arXiv 2407.11550, section 3"
    shares_heads: ClassVar[bool] = True

    alpha: float = 0.2

    def __post_init__(self) -> None:
        # A slotted dataclass is made anew, so super() without arguments would look for the class before it.
        SnapKV.__post_init__(self)
        _check_alpha(self.name, self.alpha)

    def least(self, keep: int) -> int:
        """The window, and the part ``alpha`` of the other tokens of an even share."""
        return _least(self.window, self.alpha, keep)

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        """The best of all KV heads, at least ``least(keep)`` of each."""
        return share_heads(scores, view, keep, self.least(keep))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaPyramidKV(PyramidKV):
    """AdaKV with the layer budgets of PyramidKV: layers share the tokens of the model, heads those of their layer.

    Parameters
    ----------
    alpha : float
        As for AdaKV.
    """

    name: ClassVar[str] = "adapyramidkv"
    paper: ClassVar[str] = "AdaKV, Feng et al. 2024, arXiv 2407.11550, section 3.4 (Ada-PyramidKV)"
    shares_heads: ClassVar[bool] = True

    alpha: float = 0.2

    def __post_init__(self) -> None:
        PyramidKV.__post_init__(self)
        _check_alpha(self.name, self.alpha)

    def least(self, keep: int) -> int:
        """The window, and the part ``alpha`` of the other tokens of an even share."""
        return _least(self.window, self.alpha, keep)

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        """The best of all KV heads, at least ``least(keep)`` of each."""
        return share_heads(scores, view, keep, self.least(keep))


def _check_alpha(policy: str, alpha: object) -> None:
    if type(alpha) not in (int, float) or not 0 <= alpha <= 1:  # type: ignore[operator]
        raise PolicyError(f"{policy}: alpha must be a number from 0 to 1, got {alpha!r}")


def _least(window: int, alpha: float, keep: int) -> int:
    """An integer by decimal arithmetic: 0.29 of 100 tokens are 29, and not 28 as in binary."""
    return min(keep, window) + int(Fraction(str(alpha)) * max(0, keep - window))
