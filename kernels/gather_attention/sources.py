"""Where keys and values lie, a run or pages, and how a part of them is named: some heads, the first keys, the last."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import torch

__all__ = ["HeadSource", "PageSource", "RunSource", "Source"]


class HeadSource(Protocol):
    """Keys and values of B batch rows and Hk KV heads, ``length`` keys each."""

    @property
    def kv_heads(self) -> int:
        """KV heads Hk."""

    @property
    def length(self) -> int:
        """Keys N of a head."""

    def of(self, rows: slice, heads: slice) -> Self:
        """Those of some batch rows and KV heads."""

    def before(self, stop: int) -> Self:
        """The keys before ``stop``."""


class Source(HeadSource, Protocol):
    """The same, whose last keys can be had as a run."""

    def after(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys from ``start`` on and their values as a run [B, Hk, n, Dk] and [B, Hk, n, Dv]."""


class RunSource(NamedTuple):
    """A run: k [B, Hk, N, Dk], v [B, Hk, N, Dv]."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def kv_heads(self) -> int:
        """KV heads Hk."""
        return self.k.shape[1]

    @property
    def length(self) -> int:
        """Keys N of a head."""
        return self.k.shape[2]

    def of(self, rows: slice, heads: slice) -> RunSource:
        """Those of some batch rows and KV heads."""
        return RunSource(self.k[rows, heads], self.v[rows, heads])

    def before(self, stop: int) -> RunSource:
        """The keys before ``stop``."""
        return RunSource(self.k[:, :, :stop], self.v[:, :, :stop])

    def after(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys from ``start`` on and their values, as views."""
        return self.k[:, :, start:], self.v[:, :, start:]


class PageSource(NamedTuple):
    """The first ``length`` keys of the pages that frames [B, Hk, N] name in arenas [F, P, Dk] and [F, P, Dv]."""

    k_arena: torch.Tensor
    v_arena: torch.Tensor
    frames: torch.Tensor
    length: int

    @property
    def kv_heads(self) -> int:
        """KV heads Hk."""
        return self.frames.shape[1]

    @property
    def slots(self) -> int:
        """Slots P of a page."""
        return self.k_arena.shape[1]

    def of(self, rows: slice, heads: slice) -> PageSource:
        """Those of some batch rows and KV heads."""
        return self._replace(frames=self.frames[rows, heads])

    def before(self, stop: int) -> PageSource:
        """The keys before ``stop``; pages behind them are not named any more."""
        return self._replace(frames=self.frames[:, :, : -(-stop // self.slots)], length=stop)

    def after(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys from ``start`` on and their values, gathered."""
        page = start // self.slots
        first, stop = start - page * self.slots, self.length - page * self.slots
        frames = self.frames[:, :, page : -(-self.length // self.slots)]
        k, v = (arena[frames].flatten(2, 3)[:, :, first:stop] for arena in (self.k_arena, self.v_arena))
        return k, v
