"""Queries over a tree of drafted tokens: what came before is attended as ever, the few drafts under their own mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from kvtier.kernels.gather_attention.extras import Extras, drafts_hidden
from kvtier.kernels.gather_attention.loaders import RunLoader
from kvtier.kernels.gather_attention.sources import Source
from kvtier.kernels.gather_attention.streamed import streamed_part
from kvtier.kernels.heads import accumulation_dtype, fold_bias, fold_queries
from kvtier.kernels.merge_partials import blocked as merging
from kvtier.kernels.spans import hidden_pairs
from kvtier.types import Partial, Tree, Visibility

__all__ = ["over_drafts"]

S = TypeVar("S", bound=Source)


def over_drafts(
    q: torch.Tensor,
    source: S,
    visible: Visibility | None,
    extras: Extras,
    attend: Callable[[torch.Tensor, S, Visibility | None, Extras], Partial],
    *,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention over a source whose last keys are the drafts of ``extras.tree``, if there is one."""
    tree, bias = extras.tree, extras.bias
    plain = extras._replace(tree=None)
    if tree is None or tree.first == source.length:
        return attend(q, source, visible, plain)
    if not tree.first:
        return _drafted(q, source, visible, bias, tree, scale, softcap)
    before = None if visible is None else visible._replace(k_pos=visible.k_pos[..., : tree.first])
    past_bias = None if bias is None else bias[..., : tree.first]
    past = attend(q, source.before(tree.first), before, plain._replace(bias=past_bias))
    return merging.merge_partials([past, _drafted(q, source, visible, bias, tree, scale, softcap)])


def _drafted(
    q: torch.Tensor,
    source: Source,
    visible: Visibility | None,
    bias: torch.Tensor | None,
    tree: Tree,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention over the drafts alone."""
    k, v = source.after(tree.first)
    dtype, (batch, kv_heads, drafts, _) = accumulation_dtype(q, k, v), k.shape
    hidden = drafts_hidden(tree.ancestors, drafts).repeat_interleave(kv_heads, dim=0)
    if visible is not None:
        seen = visible._replace(k_pos=visible.k_pos[..., tree.first :])
        hidden |= hidden_pairs(seen, slice(0, q.shape[2]), slice(0, drafts), batch * kv_heads)
    keys, values = (RunLoader(x.flatten(0, 1), dtype) for x in (k, v))
    part = streamed_part(
        fold_queries(q, kv_heads, dtype),
        keys,
        values,
        0,
        drafts,
        block=drafts,
        scale=scale,
        softcap=softcap,
        hidden=hidden,
        bias=None if bias is None else fold_bias(bias[..., tree.first :], batch * kv_heads, dtype),
    )
    return Partial(part.out.reshape(*q.shape[:3], part.out.shape[-1]), part.lse.reshape(q.shape[:3]))
