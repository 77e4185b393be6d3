"""Attention problems over pages, for tests of kernels, with the answer in fp64."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvtier.kernels.gather_attention import reference
from kvtier.kernels.gather_attention.extras import Extras
from kvtier.types import Partial, Tree, Visibility

__all__ = ["LIMIT", "Problem", "assert_near"]

LIMIT = 1e-5
"""Largest error of out and lse; inputs of 16 bit are converted exactly, so it is one for all types."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Queries over pages in arenas whose other frames are NaN.

    Parameters
    ----------
    sizes : tuple
        B, Hk, G, Tq, N pages, P slots.
    dims : tuple
        Dk, Dv.
    ragged : bool
        Positions out of order, each head its own.
    bias : "kv" | "query", optional
        Whether each KV head or each query head has its own bias; some keys are hidden by it.
    uneven : bool
        Heads have different numbers of keys; what lies behind them is NaN, and frames there do not exist.
    drafts : int
        The last keys are a tree of that many drafts.
    unified_max : float, optional
        Stands in for the greatest logit, however far off it is.
    """

    sizes: tuple[int, int, int, int, int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    ragged: bool = False
    window: int | None = None
    softcap: float | None = None
    bias: Literal["kv", "query"] | None = None
    uneven: bool = False
    drafts: int = 0
    unified_max: float | None = None

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries q [B, Hq, Tq, Dk], arenas [F, P, D], frames [B, Hk, N]."""
        batch, kv_heads, group, queries, pages, slots = self.sizes
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(batch, kv_heads * group, queries, self.dims[0], generator=generator)
        used = batch * kv_heads * pages
        frames = torch.randperm(2 * used + 1, generator=generator)[:used]
        k_arena, v_arena = (torch.full((2 * used + 1, slots, dim), float("nan")) for dim in self.dims)
        for arena in (k_arena, v_arena):
            arena[frames] = torch.randn(used, *arena.shape[1:], generator=generator)
        frames = frames.view(batch, kv_heads, pages)
        if self.uneven:
            missing = torch.arange(pages * slots) >= self._lengths().unsqueeze(-1)
            for arena in (k_arena, v_arena):
                arena[frames] = arena[frames].masked_fill(missing.view(*frames.shape, slots, 1), float("nan"))
            frames = frames.masked_fill(missing[..., ::slots], -(2**40))
        q, k_arena, v_arena = (tensor.to(self.dtype).to(self.device) for tensor in (q, k_arena, v_arena))
        return q, k_arena, v_arena, frames.to(self.device)

    def visible(self) -> Visibility | None:
        """Positions out of order, each head its own, some hidden from every query; None when all see all."""
        if not self.ragged:
            return None
        batch, kv_heads, _, queries, pages, slots = self.sizes
        generator = torch.Generator().manual_seed(self.seed + 1)
        keys = pages * slots
        k_pos = torch.stack([torch.randperm(2 * keys + 2, generator=generator)[:keys] for _ in range(batch * kv_heads)])
        k_pos[:, ::5] = torch.iinfo(torch.int64).max
        q_pos = torch.randint(0, 2 * keys + 2, (batch, 1), generator=generator) + torch.arange(queries)
        return Visibility(q_pos.to(self.device), k_pos.view(batch, kv_heads, keys).to(self.device), self.window)

    def extras(self) -> Extras:
        """Bias, lengths and tree, as far as the problem has them."""
        batch, kv_heads, group, queries, pages, slots = self.sizes
        generator, keys = torch.Generator().manual_seed(self.seed + 2), pages * slots
        bias, tree = None, None
        if self.bias is not None:
            heads = kv_heads if self.bias == "kv" else kv_heads * group
            bias = torch.randn(batch, heads, keys, generator=generator)
            bias[torch.rand(bias.shape, generator=generator) < 0.2] = float("-inf")
            bias = bias.to(self.device)
        if self.drafts:
            bits = torch.randint(-(2**63), 2**63 - 1, (batch, queries), generator=generator)
            tree = Tree(bits.to(self.device), keys - self.drafts)
        return Extras(bias, self._lengths().to(self.device) if self.uneven else None, tree, self.unified_max)

    def _lengths(self) -> torch.Tensor:
        """Keys of each head: none, all, or any number between."""
        batch, kv_heads, _, _, pages, slots = self.sizes
        generator = torch.Generator().manual_seed(self.seed + 3)
        share = torch.rand(batch, kv_heads, generator=generator) * 1.4 - 0.2
        return (share.clamp(0, 1) * (pages * slots)).long()

    def expected(self, scale: float) -> Partial:
        """The answer by the reference in fp64."""
        there = replace(self, device=torch.device("cpu"))
        q, k_arena, v_arena, frames = there.tensors()
        return reference.attend_pages(
            q.double(),
            k_arena.double(),
            v_arena.double(),
            frames,
            scale=scale,
            softcap=self.softcap,
            visible=there.visible(),
            extras=there.extras(),
        )


def assert_near(got: Partial, expected: Partial) -> None:
    """Raise AssertionError unless within `LIMIT`; queries without keys must be exactly (0, -inf)."""
    blind = expected.lse.isneginf()
    right = got.out.dtype == got.lse.dtype == torch.float32 and got.lse.cpu().isneginf().equal(blind)
    if not right or bool(got.out.cpu()[blind].any()):
        raise AssertionError("out and lse must be fp32, and (0, -inf) exactly where a query sees no key")
    torch.testing.assert_close(got.out.cpu().double(), expected.out, rtol=0, atol=LIMIT)
    torch.testing.assert_close(got.lse.cpu().double(), expected.lse, rtol=0, atol=LIMIT)
