"""Low-rank factors of keys with their rotation, for tests of kernels; what must not be read is NaN."""

from dataclasses import dataclass

import torch

from kvtier.kernels.lowrank_keys import Rotation, rotary_tables

__all__ = ["LowRankProblem"]


@dataclass(frozen=True, kw_only=True)
class LowRankProblem:
    """Factors of more tokens than are asked for.

    Parameters
    ----------
    sizes : tuple
        B, Hk, N pages, P tokens of a page.
    rank : int
        Columns r of the coefficients.
    dim : int
        Channels D of a head.
    turned : int
        Channels R that are rotated.
    """

    sizes: tuple[int, int, int, int]
    rank: int
    dim: int
    turned: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Rotation]:
        """What ``lowrank_keys`` takes, before ``page_tokens``."""
        batch, kv_heads, pages, slots = self.sizes
        generator = torch.Generator().manual_seed(self.seed)
        total = 2 * pages + 2
        named = torch.stack([torch.randperm(total, generator=generator)[:pages] for _ in range(batch * kv_heads)])
        named = named.view(batch, kv_heads, pages)
        u = torch.full((batch, total * slots, self.rank), torch.nan)
        positions = torch.full((batch, total * slots), 2**40)
        used = (named.unsqueeze(-1) * slots + torch.arange(slots)).flatten(1)
        for row in range(batch):
            tokens = used[row].unique()
            u[row, tokens] = torch.randn(len(tokens), self.rank, generator=generator)
            positions[row, tokens] = torch.randperm(3 * total * slots, generator=generator)[: len(tokens)]
        sv = torch.randn(batch, kv_heads, self.rank, self.dim, generator=generator) / self.rank**0.5
        moved = (x.to(self.device) for x in (u.to(self.dtype), sv.to(self.dtype), positions, named))
        return (*moved, self._rotation(positions, 3 * total * slots))  # type: ignore[return-value]

    def _rotation(self, positions: torch.Tensor, length: int) -> Rotation:
        """Tables in which only the rows of tokens that are used are numbers."""
        frequencies = 1.0 / 500.0 ** (torch.arange(self.turned // 2) / max(self.turned // 2, 1))
        tables = rotary_tables(frequencies.to(torch.promote_types(self.dtype, torch.float32)), length, scaling=1.1)
        used = torch.zeros(length, dtype=torch.bool)
        used[positions[positions < length]] = True
        cos, sin = (table.masked_fill(~used.unsqueeze(1), torch.nan).to(self.device) for table in tables)
        return Rotation(cos, sin)
