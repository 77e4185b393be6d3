"""Attention over a run of keys, and how much of it each key received: what a step of H2O or TOVA asks."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.weighed_attention import blocked, reference
from kvtier.types import Partial

__all__ = ["Weighed", "attend_weighing"]


class Weighed(NamedTuple):
    """Attention, and the weight [B, Hq, N] of each key in it, summed over the queries."""

    partial: Partial
    weights: torch.Tensor


class WeighedAttention(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def attend_weighing(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /, *, scale: float, softcap: float | None
    ) -> tuple[Partial, torch.Tensor]:
        """Attention and weights."""


def _native() -> WeighedAttention:
    from kvtier.kernels.weighed_attention import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.weighed_attention import native

    return native.obstacle(device)


OPERATOR: Final = Operator[WeighedAttention](
    "weighed_attention",
    [
        Candidate("native", _native, "keys are read once", _native_obstacle),
        Candidate("blocked", lambda: blocked, "attention, then column sums"),
        Candidate("reference", lambda: reference, "dense, in one piece"),
    ],
)


def attend_weighing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None = None
) -> Weighed:
    """`attend_run` of queries that see every key, and what `column_sums` would tell of them.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk].
    k, v : Tensor
        [B, Hk, N, Dk] and [B, Hk, N, Dv], one key at least; strided views are read in place.
    scale, softcap
        As for `attend_run`.

    Returns
    -------
    Weighed
        The partial, and weights [B, Hq, N] of its type: over the keys they sum to Tq.

    Raises
    ------
    InputError
        When shapes do not fit together.
    """
    if not (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape[:3] == v.shape[:3]
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and k.shape[1]
        and k.shape[2]
        and q.shape[1] % k.shape[1] == 0
    ):
        raise InputError(
            "attend_weighing needs q [B, Hq, Tq, Dk], k [B, Hk, N, Dk], v [B, Hk, N, Dv] with N at least 1 and Hq a "
            f"multiple of Hk, got {', '.join(str(list(tensor.shape)) for tensor in (q, k, v))}"
        )
    return Weighed(*OPERATOR.on(q.device).attend_weighing(q, k, v, scale=scale, softcap=softcap))
