"""Mean and covariance of a prompt's queries before rotation, gathered block by block (Chan, Golub and LeVeque 1979)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from kvtier.core.ledger import Ledger
from kvtier.core.rotation import unrotated
from kvtier.core.stats import QueryMoments
from kvtier.types import Rope

__all__ = ["Moments", "moments_of"]

_BLOCK = 2048
_PURPOSE = "statistics"


@dataclass(frozen=True, slots=True)
class Moments:
    """Of ``count`` queries: their mean [Hq, Dk], and ``spread`` [Hq, Dk, Dk], the sum of outer products about it."""

    count: int
    mean: torch.Tensor
    spread: torch.Tensor

    def then(self, later: Moments) -> Moments:
        """Of both; the means are subtracted before squares are summed, so that nothing cancels."""
        count = self.count + later.count
        if not count:
            return self
        apart, share = later.mean - self.mean, later.count / count
        between = apart.unsqueeze(-1) * apart.unsqueeze(-2) * (self.count * share)
        return Moments(count, self.mean + apart * share, self.spread + later.spread + between)

    def stats(self, rope: Rope, scale: float) -> QueryMoments:
        """As a policy sees them, a batch of one."""
        covariance = self.spread / max(1, self.count)
        return QueryMoments(self.mean[None].float(), covariance[None].float(), rope, scale)


def moments_of(
    query: torch.Tensor, positions: torch.Tensor, rope: Rope, *, skip: int, before: Moments | None, ledger: Ledger
) -> Moments:
    """Of the queries ``before`` and these [1, Hq, n, Dk] at positions [1, n], but for positions below ``skip``.

    The result is counted as device memory while it lives.
    """
    taken = positions[0] >= skip
    queries, places = query[0][:, taken.to(query.device)], positions[0][taken]
    heads, _, dim = queries.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    found = before
    if found is None:
        zeros = torch.zeros(heads, dim, dim, dtype=wide, device=query.device)
        found = Moments(0, zeros[..., 0].clone(), zeros)
    for start in range(0, queries.shape[1], _BLOCK):
        part = slice(start, start + _BLOCK)
        plain = unrotated(rope, queries[:, part], places[part])
        mean = plain.mean(1)
        apart = plain - mean.unsqueeze(1)
        found = found.then(Moments(plain.shape[1], mean, apart.mT @ apart))
    if found is not before:
        nbytes = found.mean.nbytes + found.spread.nbytes
        ledger.take(_PURPOSE, nbytes)
        weakref.finalize(found.spread, ledger.give, _PURPOSE, nbytes)
    return found
