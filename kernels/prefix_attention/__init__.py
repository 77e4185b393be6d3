"""Attention of requests that share prefixes (Hydragen, Juravsky et al. 2024; BatchLLM, Zheng et al. 2024)."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.prefix_attention import blocked, reference
from kvtier.kernels.prefix_attention.plan import PrefixPlan, plan_prefix
from kvtier.kernels.tiles import triton_obstacle
from kvtier.types import Partial

__all__ = ["PrefixPlan", "plan_prefix", "prefix_attention"]


class PrefixAttention(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def prefix_attention(
        self,
        q: torch.Tensor,
        k_arena: torch.Tensor,
        v_arena: torch.Tensor,
        prefix_frames: torch.Tensor,
        own_frames: torch.Tensor,
        plan: PrefixPlan,
        /,
        *,
        scale: float,
        softcap: float | None,
    ) -> Partial:
        """Attention over prefixes and own keys."""


def _triton() -> PrefixAttention:
    from kvtier.kernels.prefix_attention import triton

    return triton


OPERATOR: Final = Operator[PrefixAttention](
    "prefix_attention",
    [
        Candidate(
            "triton", _triton, "one launch for prefixes and own keys, both split to fill the GPU", triton_obstacle
        ),
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "dense, in one piece"),
    ],
)


def prefix_attention(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    prefix_frames: torch.Tensor,
    own_frames: torch.Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Softmax attention of each request over the prefix of its group and then its own keys.

    A prefix is read once for all members of its group instead of once for each. Slots behind the last token of a list
    and frames that are not named are never read. Precision, threads and gradients as for
    :func:`kvtier.kernels.gather_attention.attend_run`.

    Parameters
    ----------
    q : Tensor
        [B, Hq, Tq, Dk]: the last Tq tokens of each request; a query sees the whole prefix, and its request's own keys
        up to itself.
    k_arena, v_arena : Tensor
        [F, P, Dk] and [F, P, Dv]: F frames of P slots.
    prefix_frames : Tensor
        [Hk, pages] int64: the frames of the prefixes of all groups, end to end in the order of the groups, each list in
        whole pages of which the last may be partly filled.
    own_frames : Tensor
        [Hk, pages] int64: the same of the keys of each request alone, in the order of the requests.
    plan : PrefixPlan
        As :func:`plan_prefix` made it for these shapes.
    scale : float
        Multiplies q k^T.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)`` after scaling.

    Returns
    -------
    Partial
        out [B, Hq, Tq, Dv], lse [B, Hq, Tq]; ``(0, -inf)`` for a query that sees no key.

    Raises
    ------
    InputError
        When shapes do not fit together or to the plan.
    """
    _check(q, k_arena, v_arena, prefix_frames, own_frames, plan)
    return OPERATOR.on(q.device).prefix_attention(
        q, k_arena, v_arena, prefix_frames, own_frames, plan, scale=scale, softcap=softcap
    )


def _check(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    prefix_frames: torch.Tensor,
    own_frames: torch.Tensor,
    plan: PrefixPlan,
) -> None:
    layout = plan.layout
    heads = layout.num_kv_heads
    wanted = {
        "q": (q.shape, (len(plan.owns), layout.num_query_heads, plan.queries, layout.key_dim)),
        "k_arena": (k_arena.shape, (*k_arena.shape[:1], plan.page_tokens, layout.key_dim)),
        "v_arena": (v_arena.shape, (*k_arena.shape[:1], plan.page_tokens, layout.value_dim)),
        "prefix_frames": (prefix_frames.shape, (heads, plan.prefix_pages)),
        "own_frames": (own_frames.shape, (heads, plan.own_pages)),
    }
    for name, (got, shape) in wanted.items():
        if tuple(got) != shape:
            raise InputError(f"prefix_attention needs {name} of {list(shape)} for this plan, got {list(got)}")
