"""The pages of each KV head that score best, in order of place: what a retrieval reads."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.top_pages import blocked, reference

__all__ = ["top_pages"]


class TopPages(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def top_pages(self, scores: torch.Tensor, count: int, /) -> torch.Tensor:
        """The best pages of each row."""


def _native() -> TopPages:
    from kvtier.kernels.top_pages import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.top_pages import native

    return native.obstacle(device)


OPERATOR: Final = Operator[TopPages](
    "top_pages",
    [
        Candidate("native", _native, "the least score among the best is found by counting", _native_obstacle),
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "every page sorted"),
    ],
)


def top_pages(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` pages of each KV head with the highest scores, all of them when there are fewer.

    Parameters
    ----------
    scores : Tensor
        [B, Hk, N] of any floating type. Of equal scores any may win; NaN counts as the highest.
    count : int
        0 or more.

    Returns
    -------
    Tensor
        [B, Hk, min(count, N)] int64, ascending in each row.

    Raises
    ------
    InputError
        For another shape, or a negative count.
    """
    if scores.dim() != 3 or count < 0:
        raise InputError(
            f"top_pages needs scores [B, Hk, N] and a count of at least 0, got {list(scores.shape)} and {count}"
        )
    return OPERATOR.on(scores.device).top_pages(scores, count)
