"""Attention by torch's own fused CPU kernel, which also returns the lse: one call, no logits in memory.

The operator is not a documented interface, so it is tried once on a small problem, every feature that is used here, and left
alone for good when its answers are not right.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from kvtier.types import Partial

__all__ = ["fused_fits", "fused_part"]

_log = logging.getLogger("kvtier.kernels")


def fused_fits(q: torch.Tensor, key_dim: int, value_dim: int, softcap: float | None) -> bool:
    """Whether ``fused_part`` can serve queries like q."""
    return q.device.type == "cpu" and softcap is None and key_dim == value_dim and _operator() is not None


def fused_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    hidden: torch.Tensor | None = None,
) -> Partial:
    """Attention over one block of keys.

    Parameters
    ----------
    q : Tensor
        [H, G, Tq, D].
    k, v : Tensor
        [H, n, D] of the same type; strided views will do while D is contiguous.
    causal : bool
        Query i sees keys 0 to i.
    hidden : Tensor, optional
        [H or 1, Tq, n]: pairs that do not see each other.

    Returns
    -------
    Partial
        out [H, G, Tq, D], lse [H, G, Tq].
    """
    operator = _operator()
    if operator is None:
        raise RuntimeError("fused attention is not available here: ask fused_fits() first")
    return _call(operator, q, _last_dim_contiguous(k), _last_dim_contiguous(v), scale, causal, hidden)


def _call(
    operator: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    hidden: torch.Tensor | None,
) -> Partial:
    heads, group, queries, dim = q.shape
    if not causal and hidden is None:
        # All queries of a KV head in one block of rows: keys are read once for the whole group.
        out, lse = operator(q.reshape(heads, 1, -1, dim), k.unsqueeze(1), v.unsqueeze(1), 0.0, False, scale=scale)
        return Partial(out.view(heads, group, queries, dim), lse.view(heads, group, queries))
    k, v = k.unsqueeze(1).expand(-1, group, -1, -1), v.unsqueeze(1).expand(-1, group, -1, -1)
    if hidden is None:
        return Partial(*operator(q, k, v, 0.0, True, scale=scale))
    mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf).unsqueeze(1)
    out, lse = operator(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    # What torch makes of a query without keys differs from version to version.
    blind = hidden.all(-1).unsqueeze(1)
    return Partial(out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -math.inf))


def _last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _operator() -> Callable[..., Any] | None:
    """The operator, or None when this torch has none or it fails the trial."""
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if operator is None:
        return None
    try:
        works = all(
            _agrees(operator, dtype, kind) for dtype in _TRIAL_LIMITS for kind in ("visible", "causal", "masked")
        )
    except (RuntimeError, TypeError) as error:
        _log.info("torch %s: fused CPU attention is not used: %s", torch.__version__, error)
        return None
    if not works:
        _log.warning(
            "torch %s: fused CPU attention is not used: its answers differ from the formula", torch.__version__
        )
    return operator if works else None


_TRIAL_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-10}


def _agrees(operator: Callable[..., Any], dtype: torch.dtype, kind: str) -> bool:
    """A trial on 2 heads of 2 grouped queries; some queries see no key, or none in torch's first block of 512."""
    heads, group, queries, keys, dim = 2, 2, 5, 600, 8
    ramp = torch.arange(heads * keys * dim, dtype=torch.float64)
    k, v = (ramp * 0.37).sin().view(heads, keys, dim), (ramp * 0.11).cos().view(heads, keys, dim)
    q = (ramp[: heads * group * queries * dim] * 0.73).cos().view(heads, group, queries, dim)
    place, limit = torch.arange(keys), torch.tensor([0, 600, 550, 200, 599])
    hidden = {
        "visible": torch.zeros(1, queries, keys, dtype=torch.bool),
        "causal": (place > torch.arange(queries)[:, None])[None],
        "masked": ((place >= limit[:, None]) | ((place < 540) & (limit[:, None] > 500)))[None],
    }[kind]
    logits = (q @ k.unsqueeze(1).mT * 0.5).masked_fill(hidden.unsqueeze(1), -math.inf)
    lse = logits.logsumexp(-1)
    expected = torch.exp(logits - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)) @ v.unsqueeze(1)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    got = _call(operator, q, k, v, 0.5, kind == "causal", hidden if kind == "masked" else None)
    blind = torch.isneginf(lse)
    near = [(got.out - expected).abs().max(), (got.lse - lse).masked_fill(blind, 0.0).abs().max()]
    return bool(torch.isneginf(got.lse).equal(blind)) and float(torch.stack(near).max()) < _TRIAL_LIMITS[dtype]
