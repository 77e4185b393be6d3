"""Attention problems over encoded blocks, for tests of kernels, with the answer in fp64."""

from dataclasses import dataclass

import torch

from kvtier.kernels.encoded_attention import reference
from kvtier.kernels.encoded_attention.formats import BlockFormat
from kvtier.types import Partial, Visibility

__all__ = ["EncodedProblem"]


@dataclass(frozen=True, kw_only=True)
class EncodedProblem:
    """Queries over blocks in one arena of K beside V, whose other frames are full of 0xFF: NaN as scale and as e4m3.

    Parameters
    ----------
    sizes : tuple
        B, Hk, G, Tq, N blocks.
    """

    sizes: tuple[int, int, int, int, int]
    k_format: BlockFormat
    v_format: BlockFormat
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    ragged: bool = False
    uneven: bool = False
    window: int | None = None
    softcap: float | None = None

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries q [B, Hq, Tq, Dk], arenas [F, block_bytes], frames [B, Hk, N]."""
        batch, kv_heads, group, queries, blocks = self.sizes
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(batch, kv_heads * group, queries, self.k_format.dim, generator=generator)
        used = batch * kv_heads * blocks
        frames = torch.randperm(2 * used + 1, generator=generator)[:used]
        split = self.k_format.block_bytes
        arena = torch.full((2 * used + 1, split + self.v_format.block_bytes), 0xFF, dtype=torch.uint8)
        for layout, part in ((self.k_format, arena[:, :split]), (self.v_format, arena[:, split:])):
            raw = torch.randn(used, layout.slots, layout.dim, generator=generator)
            # Channels apart from 0, a token of zeros, and one without range.
            raw += 3 * torch.randn(layout.dim, generator=generator)
            raw[:, 1], raw[:, 2] = 0, 0.7
            part[frames] = layout.encode(raw)
        frames = frames.view(batch, kv_heads, blocks)
        lengths = self.lengths()
        if lengths is not None:
            begins = torch.arange(blocks) * self.k_format.slots
            frames = frames.masked_fill(begins >= lengths.cpu().unsqueeze(-1), 2**40)
        q, arena, frames = q.to(self.dtype).to(self.device), arena.to(self.device), frames.to(self.device)
        return q, arena[:, :split], arena[:, split:], frames

    def lengths(self) -> torch.Tensor | None:
        """Keys of each head, the first with none; frames of blocks beyond them do not exist. None when all have all."""
        if not self.uneven:
            return None
        batch, kv_heads, _, _, blocks = self.sizes
        generator = torch.Generator().manual_seed(self.seed + 2)
        lengths = torch.randint(0, blocks * self.k_format.slots + 1, (batch, kv_heads), generator=generator)
        lengths[0, 0] = 0
        return lengths.to(self.device)

    def visible(self) -> Visibility | None:
        """Positions out of order, each head its own, some hidden from every query; None when all see all."""
        if not self.ragged:
            return None
        batch, kv_heads, _, queries, blocks = self.sizes
        generator = torch.Generator().manual_seed(self.seed + 1)
        keys = blocks * self.k_format.slots
        k_pos = torch.stack([torch.randperm(2 * keys + 2, generator=generator)[:keys] for _ in range(batch * kv_heads)])
        k_pos[:, ::5] = torch.iinfo(torch.int64).max
        q_pos = torch.randint(0, 2 * keys + 2, (batch, 1), generator=generator) + torch.arange(queries)
        return Visibility(q_pos.to(self.device), k_pos.view(batch, kv_heads, keys).to(self.device), self.window)

    def expected(self, scale: float) -> Partial:
        """The answer by the reference in fp64."""
        q, k_arena, v_arena, frames = (tensor.cpu() for tensor in self.tensors())
        lengths = self.lengths()
        seen = self.visible()
        if seen is not None:
            seen = Visibility(seen.q_pos.cpu(), seen.k_pos.cpu(), seen.window)
        return reference.attend_encoded(
            q.double(),
            k_arena,
            v_arena,
            frames,
            k_format=self.k_format,
            v_format=self.v_format,
            scale=scale,
            softcap=self.softcap,
            visible=seen,
            lengths=None if lengths is None else lengths.cpu(),
        )
