"""Column sums of attention from a saved lse, in a second pass over the keys: what H2O and SnapKV vote with."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.column_sums import blocked, reference
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.spans import fits
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import Visibility

__all__ = ["column_sums"]


class ColumnSums(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

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
        """Sums over the queries."""


def _triton() -> ColumnSums:
    from kvtier.kernels.column_sums import triton

    return triton


def _native() -> ColumnSums:
    from kvtier.kernels.column_sums import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.column_sums import native

    return native.obstacle(device)


OPERATOR: Final = Operator[ColumnSums](
    "column_sums",
    [
        Candidate("triton", _triton, "weights never leave the chip", triton_obstacle),
        Candidate("native", _native, "weights never leave the registers", _native_obstacle),
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
    """Attention that each key received: the sum over the queries of ``exp(logit - lse)``.

    The lse may come from more keys than these (all parts of a sequence, merged): the sums over all of them then add up
    to one per query. Pairs that do not see each other count 0, and so does a query whose lse is -inf. Weights exist
    only tile by tile.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    lse : Tensor
        [B, Hq, Tq], natural logarithm, as attention over the keys gave it.
    k : Tensor
        [B, Hk, N, Dk]; a strided view is read in place.
    scale, softcap
        As attention had them.
    visible : Visibility, optional
        q_pos [B, Tq] and k_pos [B, Hk or 1, N]; None lets every query see every key.

    Returns
    -------
    Tensor
        [B, Hq, N], fp32, or fp64 when q or k is.

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
        and (visible is None or fits(visible, q, k.shape[1], k.shape[2]))
    ):
        shapes = [list(tensor.shape) for tensor in (q, lse, k, *(visible[:2] if visible is not None else ()))]
        raise InputError(
            "column_sums needs q [B, Hq, Tq, Dk], lse [B, Hq, Tq], k [B, Hk, N, Dk] with Hq a multiple of Hk, "
            f"and positions [B, Tq] and [B, Hk or 1, N], got {', '.join(map(str, shapes))}"
        )
    return OPERATOR.on(q.device).column_sums(q, lse, k, scale=scale, softcap=softcap, visible=visible)
