"""Merging of partials: from attention over parts of the keys to all of them (FlashAttention, Dao et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.heads import accumulation_dtype
from kvtier.kernels.merge_partials import blocked, reference
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import Partial

__all__ = ["empty_partial", "merge_partials", "sink_partial"]


class MergePartials(Protocol):
    """What an implementation of this operator provides."""

    def merge_partials(self, parts: Sequence[Partial], /) -> Partial:
        """The checked arguments of the public function."""


def _triton() -> MergePartials:
    from kvtier.kernels.merge_partials import triton

    return triton


OPERATOR: Final = Operator[MergePartials](
    "merge_partials",
    [
        Candidate("triton", _triton, "one launch for any number of parts", triton_obstacle),
        Candidate("blocked", lambda: blocked, "fewest torch operations"),
        Candidate("reference", lambda: reference, "one dense sum over the parts"),
    ],
)


def merge_partials(parts: Sequence[Partial]) -> Partial:
    """Merge partials over disjoint sets of keys into the partial over their union.

    ``m = max lse_i``, ``w_i = exp(lse_i - m)``, ``out = sum w_i out_i / sum w_i``, ``lse = m + ln sum w_i``. The order
    does not matter; a part without keys ``(0, -inf)`` changes nothing; parts that are all empty give the empty partial.

    Parameters
    ----------
    parts : sequence of Partial
        At least one; out [B, Hq, Tq, Dv] and lse [B, Hq, Tq] of equal shapes, dtypes and devices. None is written to; a
        single one is returned as it is.

    Returns
    -------
    Partial
        out [B, Hq, Tq, Dv], lse [B, Hq, Tq].

    Raises
    ------
    InputError
        Without parts, or when their shapes differ.
    """
    if not parts:
        raise InputError(
            "merge_partials needs at least one partial, got none; empty_partial() is attention over no keys"
        )
    first = parts[0]
    out_shape = first.out.shape
    if first.lse.shape != out_shape[:-1] or any(
        part.out.shape != out_shape or part.lse.shape != first.lse.shape for part in parts[1:]
    ):
        got = ", ".join(f"{list(part.out.shape)} with {list(part.lse.shape)}" for part in parts)
        raise InputError(f"partials must be out [B, Hq, Tq, Dv] with lse [B, Hq, Tq], all of one shape, got {got}")
    return OPERATOR.on(first.out.device).merge_partials(parts)


def sink_partial(s_aux: torch.Tensor, like: Partial) -> Partial:
    """Attention to a sink: a key of logit ``s_aux`` and value zero, to be merged once per step.

    Parameters
    ----------
    s_aux : Tensor
        [Hq], any floating type.
    like : Partial
        Gives shape, dtype and device.

    Raises
    ------
    InputError
        When there is not one logit per query head.
    """
    heads = like.lse.shape[1]
    if s_aux.shape != (heads,):
        raise InputError(f"a sink needs one logit per query head, [{heads}], got {list(s_aux.shape)}")
    lse = s_aux.to(like.lse).view(1, heads, 1).expand_as(like.lse)
    return Partial(like.out.new_zeros(1).expand_as(like.out), lse)


def empty_partial(q: torch.Tensor, value_dim: int) -> Partial:
    """Attention of q [B, Hq, Tq, Dk] over no keys: out [B, Hq, Tq, value_dim] of zeros, lse [B, Hq, Tq] of -inf."""
    dtype = accumulation_dtype(q)
    return Partial(
        q.new_zeros(*q.shape[:-1], value_dim, dtype=dtype), q.new_full(q.shape[:-1], float("-inf"), dtype=dtype)
    )
