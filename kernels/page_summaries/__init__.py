"""Small summaries of pages by which they are ranked: per-channel bounds (Quest, Tang et al. 2024, section 3.2)."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.page_summaries import blocked, reference
from kvtier.kernels.tiles import triton_obstacle

__all__ = ["page_bounds"]


class PageSummaries(Protocol):
    """What an implementation of this operator provides: the public function with a checked argument."""

    def page_bounds(self, k: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds over the slots."""


def _triton() -> PageSummaries:
    from kvtier.kernels.page_summaries import triton

    return triton


OPERATOR: Final = Operator[PageSummaries](
    "page_summaries",
    [
        Candidate("triton", _triton, "pages are read once", triton_obstacle),
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "slot by slot"),
    ],
)


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of each channel over the slots of a page.

    Parameters
    ----------
    k : Tensor
        [..., P, D] with at least one slot.

    Returns
    -------
    tuple of Tensor
        kmin and kmax, each [..., D] of the type of k: exact, no rounding.

    Raises
    ------
    InputError
        When k has no slots or fewer than two dimensions.
    """
    if k.dim() < 2 or not k.shape[-2]:
        raise InputError(f"page_bounds needs keys [..., P, D] with at least one slot, got {list(k.shape)}")
    return OPERATOR.on(k.device).page_bounds(k)
