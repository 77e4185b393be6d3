"""Summaries of sealed pages, built once and used to rank them (Quest, Tang et al. 2024, section 3.3)."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.page_summaries import blocked, reference

__all__ = ["page_bounds"]


class PageSummaries(Protocol):
    """What an implementation of this operator provides."""

    def page_bounds(self, keys: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]:
        """The checked arguments of the public function."""


OPERATOR: Final = Operator[PageSummaries](
    "page_summaries",
    [
        Candidate("blocked", lambda: blocked, "one pass over the keys"),
        Candidate("reference", lambda: reference, "slot by slot"),
    ],
)


def page_bounds(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel-wise minimum and maximum of the keys of each page.

    Parameters
    ----------
    keys : Tensor
        [..., P, D] with at least one slot.

    Returns
    -------
    low, high : Tensor
        [..., D] each, in the dtype of the keys: exact, nothing is rounded.

    Raises
    ------
    InputError
        For pages without slots.
    """
    if keys.dim() < 2 or not keys.shape[-2]:
        raise InputError(f"page_bounds needs keys [..., P, D] with P at least 1, got {list(keys.shape)}")
    return OPERATOR.on(keys.device).page_bounds(keys)
