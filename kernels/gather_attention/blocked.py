"""Attention over a run or over pages in blocks: fused for many queries or few keys, streamed for few queries over many keys.

The sizes below were measured on two cores of an AVX-512 CPU with 1 MiB of L2 each; the README beside this file has the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kvtier.kernels.gather_attention.fused import fused_fits, fused_part
from kvtier.kernels.gather_attention.loaders import Loader, PageLoader, RunLoader
from kvtier.kernels.gather_attention.streamed import DIRECT_ROWS, streamed_part
from kvtier.kernels.heads import accumulation_dtype, fold_heads, fold_queries
from kvtier.kernels.merge_partials import blocked as merging
from kvtier.kernels.spans import Rows, Span, causal_plan, hidden_pairs, plan_blocks, whole_plan
from kvtier.types import Partial, Visibility

__all__ = ["attend_pages", "attend_run"]

STREAMED_ROWS: Final = 16
"""Up to this many queries per KV head, reading keys costs more than computing with them."""
FUSED_KEYS: Final = 1024
"""Up to this many keys, one fused call is quicker than the handful of calls of the streamed form, even for one query."""
CAUSAL_ROWS: Final = 4096
MASKED_BLOCK: Final = 512
COPIED_KEYS: Final = 4096
CACHE_BYTES: Final = 4 * 2**20
LOGIT_BYTES: Final = 64 * 2**20
PARTS_HELD: Final = 8


def attend_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> Partial:
    """Attention over views k [B, Hk, N, Dk], v [B, Hk, N, Dv]."""
    folded_k, folded_v = fold_heads(k), fold_heads(v)
    if folded_k is None or folded_v is None:
        rows = [
            attend_run(q[b : b + 1], k[b : b + 1], v[b : b + 1], scale=scale, softcap=softcap, visible=_row(visible, b))
            for b in range(q.shape[0])
        ]
        return Partial(torch.cat([row.out for row in rows]), torch.cat([row.lse for row in rows]))
    dtype = accumulation_dtype(q, k, v)
    folded_q = fold_queries(q, k.shape[1], dtype)
    stage = DIRECT_ROWS < folded_q.shape[1] * folded_q.shape[2] <= STREAMED_ROWS and k.shape[2] > FUSED_KEYS
    keys, values = RunLoader(folded_k, dtype, stage=stage), RunLoader(folded_v, dtype, stage=stage)
    return _shaped(_Attention(folded_q, keys, values, scale, softcap, visible).partial(), q)


def attend_pages(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> Partial:
    """Attention over the pages [B, Hk, N] of arenas [F, P, Dk] and [F, P, Dv]."""
    dtype = accumulation_dtype(q, k_arena, v_arena)
    folded_q, folded_frames = fold_queries(q, frames.shape[1], dtype), frames.flatten(0, 1)
    keys, values = PageLoader(k_arena, folded_frames, dtype), PageLoader(v_arena, folded_frames, dtype)
    return _shaped(_Attention(folded_q, keys, values, scale, softcap, visible).partial(), q)


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
    ) -> None:
        self.q = q
        self.keys = keys
        self.values = values
        self.scale = scale
        self.softcap = softcap
        self.visible = visible
        self.heads, self.group, self.queries, _ = q.shape
        self.few = self.group * self.queries <= STREAMED_ROWS
        self.fused = fused_fits(q, keys.dim, values.dim, softcap)

    def partial(self) -> Partial:
        """out [H, G, Tq, Dv], lse [H, G, Tq]."""
        if self.q.numel() == 0 or self.keys.length == 0:
            return self._empty()
        plan = self._plan()
        if len(plan) == 1:
            return self._over_rows(plan[0])
        whole = self._empty()
        for rows in plan:
            part = self._over_rows(rows)
            whole.out[:, :, rows.start : rows.stop] = part.out
            whole.lse[:, :, rows.start : rows.stop] = part.lse
        return whole

    def _plan(self) -> list[Rows]:
        tile = self.queries if self.few else max(MASKED_BLOCK // (1 if self.fused else self.group), 1)
        if self.visible is None:
            return whole_plan(self.queries, self.keys.length, CAUSAL_ROWS if self.fused else tile)
        if self.fused and not self.few:
            plan = causal_plan(self.visible, CAUSAL_ROWS)
            if plan is not None:
                return plan
        return plan_blocks(self.visible, tile, _multiple(MASKED_BLOCK, self.keys.align))

    def _over_rows(self, rows: Rows) -> Partial:
        q = self.q[:, :, rows.start : rows.stop]
        parts: list[Partial] = []
        for span in rows.spans:
            fused = self.fused and not (self.few and span.stop - span.start > FUSED_KEYS)
            for piece in span.pieces(self._most_keys(span, q, fused)):
                parts.append(self._fused(q, rows, piece) if fused else self._streamed(q, rows, piece))
                if len(parts) == PARTS_HELD:
                    parts = [merging.merge_partials(parts)]
        if not parts:
            return self._empty(rows.stop - rows.start)
        return merging.merge_partials(parts)

    def _most_keys(self, span: Span, q: torch.Tensor, fused: bool) -> int:
        """Keys that one part may cover: bounds copies, masks and logits, whatever the length of the run."""
        if fused:
            return self.keys.length if span.kind == "visible" and not self.keys.copies else COPIED_KEYS
        bytes_per_key = self.heads * self.group * q.shape[2] * q.element_size()
        budget = LOGIT_BYTES if self.few or q.device.type != "cpu" else CACHE_BYTES
        return _multiple(max(budget // bytes_per_key, MASKED_BLOCK), self.keys.align)

    def _fused(self, q: torch.Tensor, rows: Rows, span: Span) -> Partial:
        return fused_part(
            q,
            self.keys(span.start, span.stop),
            self.values(span.start, span.stop),
            scale=self.scale,
            causal=span.kind == "causal",
            hidden=self._hidden(rows, span),
        )

    def _streamed(self, q: torch.Tensor, rows: Rows, span: Span) -> Partial:
        bytes_per_key = self.heads * max(self.keys.dim, self.values.dim) * q.element_size()
        cache = CACHE_BYTES if q.device.type == "cpu" else LOGIT_BYTES
        return streamed_part(
            q * self.scale,
            self.keys,
            self.values,
            span.start,
            span.stop,
            block=_multiple(max(cache // bytes_per_key, 1), self.keys.align),
            softcap=self.softcap,
            hidden=self._hidden(rows, span),
        )

    def _hidden(self, rows: Rows, span: Span) -> torch.Tensor | None:
        if span.kind != "masked" or self.visible is None:
            return None
        return hidden_pairs(self.visible, slice(rows.start, rows.stop), slice(span.start, span.stop), self.heads)

    def _empty(self, queries: int | None = None) -> Partial:
        shape = (self.heads, self.group, self.queries if queries is None else queries)
        return Partial(self.q.new_zeros(*shape, self.values.dim), self.q.new_full(shape, float("-inf")))


def _shaped(part: Partial, q: torch.Tensor) -> Partial:
    return Partial(part.out.reshape(*q.shape[:3], part.out.shape[-1]), part.lse.reshape(q.shape[:3]))


def _row(visible: Visibility | None, b: int) -> Visibility | None:
    if visible is None:
        return None
    return Visibility(visible.q_pos[b : b + 1], visible.k_pos[b : b + 1], visible.window)


def _multiple(count: int, of: int) -> int:
    return max(count // of, 1) * of
