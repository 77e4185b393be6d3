"""Requests that share prefixes, over pages, for tests of kernels; what must not be read is NaN."""

from dataclasses import dataclass

import torch

from kvtier.kernels.prefix_attention import PrefixPlan, plan_prefix
from kvtier.kernels.prefix_attention.programs import Span
from kvtier.types import DTypeName, LayerLayout, Partial

__all__ = ["PrefixProblem"]


@dataclass(frozen=True, kw_only=True)
class PrefixProblem:
    """A batch of requests.

    Parameters
    ----------
    groups, prefix_lengths, own_lengths, queries
        As for ``plan_prefix``.
    sizes : tuple
        Hk, G, P slots.
    dims : tuple
        Dk, Dv.
    """

    groups: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    own_lengths: tuple[int, ...]
    sizes: tuple[int, int, int]
    dims: tuple[int, int]
    dtype: DTypeName
    device: torch.device
    queries: int = 1
    softcap: float | None = None
    seed: int = 0

    def plan(self) -> PrefixPlan:
        """The plan of this batch."""
        kv_heads, group, slots = self.sizes
        layout = LayerLayout(
            num_query_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            key_dim=self.dims[0],
            value_dim=self.dims[1],
            dtype=self.dtype,
        )
        return plan_prefix(
            self.groups,
            self.prefix_lengths,
            self.own_lengths,
            layout=layout,
            page_tokens=slots,
            device=self.device,
            queries=self.queries,
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Queries, arenas, prefix frames and own frames, as ``prefix_attention`` takes them."""
        kv_heads, group, slots = self.sizes
        generator = torch.Generator().manual_seed(self.seed)
        lists = [[-(-length // slots) for length in lengths] for lengths in (self.prefix_lengths, self.own_lengths)]
        used = kv_heads * sum(map(sum, lists))
        frames = torch.randperm(2 * used + 1, generator=generator)[:used]
        prefix, own = frames.split([kv_heads * sum(pages) for pages in lists])
        prefix, own = prefix.view(kv_heads, -1), own.view(kv_heads, -1)
        k_arena, v_arena = (torch.full((2 * used + 1, slots, dim), torch.nan) for dim in self.dims)
        for named, lengths in ((prefix, self.prefix_lengths), (own, self.own_lengths)):
            page = 0
            for length in lengths:
                for start in range(0, length, slots):
                    filled = min(slots, length - start)
                    for arena in (k_arena, v_arena):
                        shape = (kv_heads, filled, arena.shape[2])
                        arena[named[:, page], :filled] = torch.randn(shape, generator=generator)
                    page += 1
        q = torch.randn(len(self.groups), kv_heads * group, self.queries, self.dims[0], generator=generator)
        element = getattr(torch, self.dtype)
        floats = (x.to(element).to(self.device) for x in (q, k_arena, v_arena))
        return (*floats, prefix.to(self.device), own.to(self.device))

    def expected(self, scale: float) -> Partial:
        """Softmax attention in fp64, one request, one query head and one query at a time."""
        q, k_arena, v_arena, prefix, own = (x.cpu() for x in self.tensors())
        plan, group = self.plan(), self.sizes[1]
        out = torch.zeros(*q.shape[:3], self.dims[1], dtype=torch.float64)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
        for request, its_group in enumerate(self.groups):
            for head in range(q.shape[1]):
                shared = self._slots(prefix[head // group], plan.prefixes[its_group])
                alone = self._slots(own[head // group], plan.owns[request])
                for query in range(self.queries):
                    seen = shared + alone[: max(0, len(alone) - self.queries + 1 + query)]
                    if not seen:
                        continue
                    logits = k_arena.flatten(0, 1)[seen].double() @ q[request, head, query].double() * scale
                    if self.softcap is not None:
                        logits = (logits / self.softcap).tanh() * self.softcap
                    lse[request, head, query] = logits.logsumexp(0)
                    out[request, head, query] = logits.softmax(0) @ v_arena.flatten(0, 1)[seen].double()
        return Partial(out, lse)

    def _slots(self, frames: torch.Tensor, span: Span) -> list[int]:
        """Where the tokens of a list lie in an arena, ``frame * P + place``."""
        slots = self.sizes[2]
        return [int(frames[span.page + at // slots]) * slots + at % slots for at in range(span.length)]
