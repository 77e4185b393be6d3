"""Attention in blocks: fused for many queries or few keys, streamed for few queries over many keys.

The sizes below were measured on two cores of an AVX-512 CPU with 1 MiB of L2 each; README.md has the numbers. Which of
the two is chosen is in `table.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypedDict, TypeVar

import torch

from kvtier.kernels.gather_attention.drafts import over_drafts
from kvtier.kernels.gather_attention.extras import PLAIN, Extras
from kvtier.kernels.gather_attention.fused import fused_fits, fused_part, fused_whole
from kvtier.kernels.gather_attention.loaders import Loader, PageLoader, RunLoader
from kvtier.kernels.gather_attention.ragged import over_pieces
from kvtier.kernels.gather_attention.sources import PageSource, RunSource
from kvtier.kernels.gather_attention.streamed import streamed_part
from kvtier.kernels.gather_attention.table import COPIES, VIEWS
from kvtier.kernels.gather_attention.unified import unified_part
from kvtier.kernels.heads import accumulation_dtype, fold_bias, fold_heads, fold_queries
from kvtier.kernels.merge_partials import blocked as merging
from kvtier.kernels.scratch import KEPT_BYTES
from kvtier.kernels.spans import Rows, Span, all_seen, batch_row, causal_plan, hidden_pairs, plan_blocks, whole_plan
from kvtier.types import Partial, Visibility

__all__ = ["attend_loaded", "attend_pages", "attend_run"]

S = TypeVar("S", RunSource, PageSource)

CACHE_BYTES: Final = 4 * 2**20
"""Blocks of keys that are copied or multiplied are of this size."""
FUSED_ROWS: Final = 4096
"""Queries per fused call where no mask is needed; also the most keys that are copied for one."""
BLOCK: Final = 512
"""Queries and keys of a block that is skipped, seen whole or masked; half of it for a window of less than 4 blocks."""
SCRATCH_BYTES: Final = KEPT_BYTES
PARTS_HELD: Final = 8


def attend_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Attention over views k [B, Hk, N, Dk], v [B, Hk, N, Dv]."""
    return _attend(_over_run, q, RunSource(k, v), scale, softcap, visible, extras)


def attend_pages(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Attention over the pages [B, Hk, N] of arenas [F, P, Dk] and [F, P, Dv]."""
    source = PageSource(k_arena, v_arena, frames, frames.shape[2] * k_arena.shape[1])
    return _attend(_over_pages, q, source, scale, softcap, visible, extras)


def _attend(
    regular: Callable[[torch.Tensor, S, float, float | None, Visibility | None, Extras], Partial],
    q: torch.Tensor,
    source: S,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras,
) -> Partial:
    """Attention by ``regular``, which knows neither ragged heads nor trees."""

    def whole(q: torch.Tensor, source: S, visible: Visibility | None, extras: Extras) -> Partial:
        if visible is not None and all_seen(visible):
            visible = None
        return regular(q, source, scale, softcap, visible, extras)

    def over_tree(q: torch.Tensor, source: S, visible: Visibility | None, extras: Extras) -> Partial:
        return over_drafts(q, source, visible, extras, whole, scale=scale, softcap=softcap)

    return over_pieces(q, source, visible, extras, over_tree)


def _over_run(
    q: torch.Tensor,
    source: RunSource,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras,
) -> Partial:
    k, v = source
    dtype = accumulation_dtype(q, k, v)
    views = k.dtype == v.dtype == dtype
    if visible is None and _one_call(q, k.shape, v.shape[3], dtype, softcap, extras, views=views):
        return fused_whole(q.to(dtype), k.to(dtype), v.to(dtype), scale)
    folded_k, folded_v = fold_heads(k), fold_heads(v)
    if folded_k is None or folded_v is None:
        parts = [
            _over_run(q[row], RunSource(k[row], v[row]), scale, softcap, batch_row(visible, row), extras.of_row(row))
            for row in (slice(b, b + 1) for b in range(q.shape[0]))
        ]
        return Partial(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))
    keys, values = RunLoader(folded_k, dtype), RunLoader(folded_v, dtype)
    return _shaped(_Attention(fold_queries(q, k.shape[1], dtype), keys, values, scale, softcap, visible, extras), q)


def _over_pages(
    q: torch.Tensor,
    source: PageSource,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras,
) -> Partial:
    k_arena, v_arena, frames, length = source
    dtype = accumulation_dtype(q, k_arena, v_arena)
    k_shape = torch.Size((*frames.shape[:2], frames.shape[2] * k_arena.shape[1], k_arena.shape[2]))
    if visible is None and _one_call(q, k_shape, v_arena.shape[2], dtype, softcap, extras, views=False):
        index = frames.flatten()
        k, v = (arena.index_select(0, index).view(k_shape)[:, :, :length].to(dtype) for arena in (k_arena, v_arena))
        return fused_whole(q.to(dtype), k, v, scale)
    folded_frames = frames.flatten(0, 1)
    keys, values = (PageLoader(arena, folded_frames, dtype, length) for arena in (k_arena, v_arena))
    folded_q = fold_queries(q, frames.shape[1], dtype)
    return _shaped(_Attention(folded_q, keys, values, scale, softcap, visible, extras), q)


def attend_loaded(
    q: torch.Tensor,
    kv_heads: int,
    keys: Loader,
    values: Loader,
    *,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> Partial:
    """Attention over folded keys and values [H, N, ...] of ``dtype``, H = B * Hk, wherever their blocks come from."""
    if visible is not None and all_seen(visible):
        visible = None
    return _shaped(_Attention(fold_queries(q, kv_heads, dtype), keys, values, scale, softcap, visible, PLAIN), q)


def _one_call(
    q: torch.Tensor,
    k_shape: torch.Size,
    value_dim: int,
    dtype: torch.dtype,
    softcap: float | None,
    extras: Extras,
    *,
    views: bool,
) -> bool:
    """Whether one fused call is the quickest way over keys that every query sees; ``views`` if none need be copied."""
    batch, kv_heads, keys, key_dim = k_shape
    if not _fused_serves(q, key_dim, value_dim, softcap, extras) or not keys or not q.numel():
        return False
    key_bytes = batch * kv_heads * key_dim * dtype.itemsize
    point, rows = VIEWS if views else COPIES, q.shape[1] // kv_heads * q.shape[2]
    return point.fused(rows, keys * key_bytes) and (views or keys * key_bytes <= CACHE_BYTES)


def _fused_serves(q: torch.Tensor, key_dim: int, value_dim: int, softcap: float | None, extras: Extras) -> bool:
    """Whether torch's kernel can: it takes no bias, and it finds the greatest logit by itself."""
    return extras.bias is None and extras.unified_max is None and fused_fits(q, key_dim, value_dim, softcap)


class _SpanOptions(TypedDict):
    """What both streamed forms are given about a span."""

    block: int
    scale: float
    softcap: float | None
    hidden: torch.Tensor | None
    bias: torch.Tensor | None


class _Attention:
    """One problem with folded heads: q [H, G, Tq, Dk] of the accumulation type, keys and values [H, N, ...]."""

    def __init__(
        self,
        q: torch.Tensor,
        keys: Loader,
        values: Loader,
        scale: float,
        softcap: float | None,
        visible: Visibility | None,
        extras: Extras,
    ) -> None:
        self.q = q
        self.keys = keys
        self.values = values
        self.scale = scale
        self.softcap = softcap
        self.visible = visible
        self.unified_max = extras.unified_max
        self.heads, self.group, self.queries, _ = q.shape
        self.point = COPIES if keys.copies else VIEWS
        self.few = self.group * self.queries <= self.point.rows
        self.fused = _fused_serves(q, keys.dim, values.dim, softcap, extras)
        self.bias = None if extras.bias is None else fold_bias(extras.bias, self.heads, q.dtype)
        self.block = BLOCK // 2 if visible is not None and (visible.window or 4 * BLOCK) < 4 * BLOCK else BLOCK
        self.key_bytes = self.heads * max(keys.dim, values.dim) * q.element_size()

    def partial(self) -> Partial:
        """Attention over all keys: out [H, G, Tq, Dv], lse [H, G, Tq]."""
        if self.q.numel() == 0 or self.keys.length == 0:
            return self._empty(self.queries)
        plan = self._plan()
        if len(plan) == 1:
            return self._over_rows(plan[0])
        whole = self._empty(self.queries)
        for rows in plan:
            part = self._over_rows(rows)
            whole.out[:, :, rows.start : rows.stop] = part.out
            whole.lse[:, :, rows.start : rows.stop] = part.lse
        return whole

    def _plan(self) -> list[Rows]:
        if self.visible is None:
            rows = self._copied_keys() if self.fused else self._tile_rows()
            return whole_plan(self.queries, self.keys.length, rows)
        if self.fused and not self.few:
            plan = causal_plan(self.visible, self._copied_keys())
            if plan is not None:
                return plan
        return plan_blocks(self.visible, self._tile_rows(), _multiple(self.block, self.keys.align))

    def _tile_rows(self) -> int:
        """Queries per block where masks or logits are held."""
        if self.few:
            return self.queries
        held = SCRATCH_BYTES // (self.heads * self.group * BLOCK * self.q.element_size())
        return self.block if self.fused else max(min(self.block // self.group, held), 1)

    def _copied_keys(self) -> int:
        """Keys per fused call where they must be copied to the accumulation type."""
        return _multiple(min(max(CACHE_BYTES // self.key_bytes, BLOCK), FUSED_ROWS), self.keys.align)

    def _over_rows(self, rows: Rows) -> Partial:
        q = self.q[:, :, rows.start : rows.stop]
        parts: list[Partial] = []
        for span in rows.spans:
            span_bytes = (span.stop - span.start) * self.key_bytes
            fused = self.fused and self.point.fused(self.group * self.queries, span_bytes)
            for piece in span.pieces(self._most_keys(span, q, fused)):
                parts.append(self._fused(q, rows, piece) if fused else self._streamed(q, rows, piece))
                if len(parts) == PARTS_HELD:
                    parts = [merging.merge_partials(parts)]
        return merging.merge_partials(parts) if parts else self._empty(rows.stop - rows.start)

    def _most_keys(self, span: Span, q: torch.Tensor, fused: bool) -> int:
        """Keys that one part may cover: bounds copies, masks and logits, whatever the length of the run."""
        if fused and span.kind == "visible":
            return self._copied_keys() if self.keys.copies else self.keys.length
        if fused:
            return _multiple(self.block, self.keys.align)
        logit_bytes = self.heads * self.group * q.shape[2] * q.element_size()
        budget = SCRATCH_BYTES if self.few or q.device.type != "cpu" else CACHE_BYTES
        return _multiple(max(budget // logit_bytes, BLOCK), self.keys.align)

    def _fused(self, q: torch.Tensor, rows: Rows, span: Span) -> Partial:
        return fused_part(
            q,
            self.keys.load(span.start, span.stop, "keys"),
            self.values.load(span.start, span.stop, "values"),
            scale=self.scale,
            causal=span.kind == "causal",
            hidden=self._hidden(rows, span),
        )

    def _streamed(self, q: torch.Tensor, rows: Rows, span: Span) -> Partial:
        cache = CACHE_BYTES if q.device.type == "cpu" else SCRATCH_BYTES
        span_of = (q, self.keys, self.values, span.start, span.stop)
        options: _SpanOptions = {
            "block": _multiple(max(cache // self.key_bytes, 1), self.keys.align),
            "scale": self.scale,
            "softcap": self.softcap,
            "hidden": self._hidden(rows, span),
            "bias": None if self.bias is None else self.bias[..., span.start : span.stop],
        }
        if self.unified_max is not None:
            part = unified_part(*span_of, base=self.unified_max, **options)
            if part is not None:
                return part
        return streamed_part(*span_of, **options)

    def _hidden(self, rows: Rows, span: Span) -> torch.Tensor | None:
        if span.kind != "masked" or self.visible is None:
            return None
        return hidden_pairs(self.visible, slice(rows.start, rows.stop), slice(span.start, span.stop), self.heads)

    def _empty(self, queries: int) -> Partial:
        shape = (self.heads, self.group, queries)
        return Partial(self.q.new_zeros(*shape, self.values.dim), self.q.new_full(shape, float("-inf")))


def _shaped(attention: _Attention, q: torch.Tensor) -> Partial:
    part = attention.partial()
    return Partial(part.out.reshape(*q.shape[:3], part.out.shape[-1]), part.lse.reshape(q.shape[:3]))


def _multiple(count: int, of: int) -> int:
    return max(count // of, 1) * of
