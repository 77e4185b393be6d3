"""Attention by torch's own fused CPU kernel, which also returns the lse: one call, no logits in memory.

The operator is not a documented interface, so everything that is used of it is tried once on a small problem, and it is
left alone for good when an answer is not right.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, Final

import torch

from kvtier.types import Partial

__all__ = ["fused_fits", "fused_part", "fused_whole"]

_log = logging.getLogger("kvtier.kernels")

_attention: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_TRIAL_LIMITS: Final = {torch.float32: 1e-4, torch.float64: 1e-10}


def fused_fits(q: torch.Tensor, key_dim: int, value_dim: int, softcap: float | None) -> bool:
    """Whether the fused kernel can serve queries like q."""
    return softcap is None and key_dim == value_dim and q.device.type == "cpu" and _trusted()


def fused_whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Partial:
    """Attention of q [B, Hq, Tq, D] over k and v [B, Hk, N, D] of its type, at least one key, seen by every query."""
    # All queries of a KV head side by side: its keys are read once for the whole group.
    shape = q.shape
    grouped = q.reshape(shape[0], k.shape[1], -1, shape[3])
    out, lse = _attention(grouped, _readable(k), _readable(v), 0.0, False, scale=scale)
    return Partial(out.reshape(shape), lse.reshape(shape[:3]))


def fused_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    hidden: torch.Tensor | None = None,
) -> Partial:
    """Attention over one block of at least one key.

    Parameters
    ----------
    q : Tensor
        [H, G, Tq, D].
    k, v : Tensor
        [H, n, D], of the type of q.
    causal : bool
        Query i sees keys 0 to i.
    hidden : Tensor, optional
        [H or 1, Tq, n]: pairs that do not see each other.

    Returns
    -------
    Partial
        out [H, G, Tq, D], lse [H, G, Tq].
    """
    k, v = _readable(k).unsqueeze(1), _readable(v).unsqueeze(1)
    if not causal and hidden is None:
        return fused_whole(q, k, v, scale)
    # A group shares its keys by a stride of 0: not every version of the kernel knows grouped queries.
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    if hidden is None:
        return Partial(*_attention(q, k, v, 0.0, True, scale=scale))
    mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf).unsqueeze(1)
    out, lse = _attention(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    # What it makes of a query without keys differs from version to version.
    blind = hidden.all(-1).unsqueeze(1)
    return Partial(out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -math.inf))


def _readable(x: torch.Tensor) -> torch.Tensor:
    # The kernel honours every stride but the last.
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _trusted() -> bool:
    """Whether this torch has the kernel and it passes the trial."""
    if _attention is None:
        return False
    try:
        right = all(_agrees(dtype, kind) for dtype in _TRIAL_LIMITS for kind in ("visible", "causal", "masked"))
    except (RuntimeError, TypeError) as error:
        _log.info("torch %s: its fused CPU attention is not used: %s", torch.__version__, error)
        return False
    if not right:
        _log.warning("torch %s: its fused CPU attention is not used: the answers are wrong", torch.__version__)
    return right


def _agrees(dtype: torch.dtype, kind: str) -> bool:
    """A trial on 2 KV heads of 2 queries each; some queries see no key, or none in the kernel's first block of 512."""
    place, limit = torch.arange(600, device="cpu"), torch.tensor([0, 600, 550, 200, 599], device="cpu")
    hidden = {
        "visible": torch.zeros(1, 5, 600, dtype=torch.bool, device="cpu"),
        "causal": (place > place[:5, None])[None],
        "masked": ((place >= limit[:, None]) | ((place < 540) & (limit[:, None] > 500)))[None],
    }[kind]
    ramp = torch.arange(2 * 600 * 8, dtype=torch.float64, device="cpu")
    q = (ramp[: 2 * 2 * 5 * 8] * 0.73).cos().view(2, 2, 5, 8)
    k, v = (ramp * 0.37).sin().view(2, 600, 8), (ramp * 0.11).cos().view(2, 600, 8)
    logits = (q @ k.unsqueeze(1).mT * 0.5).masked_fill(hidden.unsqueeze(1), -math.inf)
    lse = logits.logsumexp(-1)
    blind = torch.isneginf(lse)
    out = torch.exp(logits - lse.masked_fill(blind, 0.0).unsqueeze(-1)) @ v.unsqueeze(1)
    got = fused_part(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        scale=0.5,
        causal=kind == "causal",
        hidden=hidden if kind == "masked" else None,
    )
    worst = max(float((got.out - out).abs().max()), float((got.lse - lse).masked_fill(blind, 0.0).abs().max()))
    return bool(torch.isneginf(got.lse).equal(blind)) and worst < _TRIAL_LIMITS[dtype]
