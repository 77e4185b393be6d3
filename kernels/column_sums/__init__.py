"""Attention summed per key, by a second pass with the saved log-sum-exp: what H2O, SnapKV and D2O rank tokens by."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.column_sums import blocked, reference
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.types import Visibility

__all__ = ["column_sums"]


class ColumnSums(Protocol):
    """What an implementation of this operator provides."""

    def column_sums(
        self,
        q: torch.Tensor,
        lse: torch.Tensor,
        k: torch.Tensor,
        /,
        *,
        scale: float,
        softcap: float | None,
        visible: Visibility | None,
    ) -> torch.Tensor:
        """The checked arguments of the public function."""


OPERATOR: Final = Operator[ColumnSums](
    "column_sums",
    [
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "dense, in one piece"),
    ],
)


def column_sums(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
) -> torch.Tensor:
    """Probabilities ``exp(logit - lse)`` of every query, summed per key.

    The matrix of probabilities never exists as a whole.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    lse : Tensor
        [B, Hq, Tq], over all keys that each query attended to, natural logarithm; -inf for a query that saw none.
    k : Tensor
        [B, Hk, N, Dk], any part of those keys.
    scale, softcap, visible
        As for :func:`kvtier.kernels.gather_attention.attend_run`.

    Returns
    -------
    Tensor
        [B, Hq, N] fp32, or fp64 for fp64 inputs.

    Raises
    ------
    InputError
        When shapes do not fit together.
    """
    if not (
        q.dim() == k.dim() == 4
        and lse.shape == q.shape[:3]
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and k.shape[1]
        and q.shape[1] % k.shape[1] == 0
    ):
        raise InputError(
            "column_sums needs q [B, Hq, Tq, Dk], lse [B, Hq, Tq], k [B, Hk, N, Dk] with Hq a multiple of Hk, "
            f"got {list(q.shape)}, {list(lse.shape)}, {list(k.shape)}"
        )
    return OPERATOR.on(q.device).column_sums(q, lse, k, scale=scale, softcap=softcap, visible=visible)
