"""Slow and obvious: slots of one row and layer as plain tensors, and rotations by position as complex numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvtier.core.policy import MergePlan
from kvtier.types import Rope

__all__ = ["PlainSlots", "Seen", "rotate"]


def rotate(rope: Rope, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Vectors [..., n, D] fp64 multiplied, pair by pair, by exp(i * position * frequency); positions [..., n]."""
    pairs = len(rope.frequencies)
    numbers = torch.complex(vectors[..., :pairs].double(), vectors[..., pairs : 2 * pairs].double())
    angles = positions.double()[..., None] * torch.tensor(rope.frequencies, dtype=torch.float64)
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, vectors[..., 2 * pairs :].double()], dim=-1)


@dataclass
class Seen:
    """What was seen of a running prompt: weights of every query over the slots then, and the queries."""

    weights: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    scale: float = 1.0

    def votes(self, last: int | None, slots: int) -> torch.Tensor:
        """Weights of the ``last`` queries summed per slot [Hq, slots]; of all for None."""
        voters = self.weights if last is None else self.weights[-last:]
        return torch.stack([torch.nn.functional.pad(one, (0, slots - one.shape[1])) for one in voters]).sum(0)


@dataclass
class PlainSlots:
    """The slots of one row and layer, in the order of their positions.

    keys, values [Hk, T, D], positions [Hk, T]; running votes [Hq, T] and budget once it evicts at every step.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    votes: torch.Tensor
    sealed: int = 0
    opened: bool = False
    budget: int = 0
    memory: torch.Tensor | None = None
    seen: Seen | None = None

    @property
    def length(self) -> int:
        """Slots of each KV head."""
        return self.keys.shape[1]

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Add K [Hk, n, Dk], V [Hk, n, Dv] at positions [n]."""
        heads, count = keys.shape[:2]
        self.keys = torch.cat([self.keys, keys.double()], dim=1)
        self.values = torch.cat([self.values, values.double()], dim=1)
        self.positions = torch.cat([self.positions, positions.expand(heads, count)], dim=1)
        self.votes = torch.cat([self.votes, self.votes.new_zeros(self.votes.shape[0], count)], dim=1)

    def take(self, keep: torch.Tensor) -> None:
        """Leave slots [Hk, K]."""
        group = self.votes.shape[0] // keep.shape[0]
        self.keys, self.values = (
            part.gather(1, keep[..., None].expand(-1, -1, part.shape[2])) for part in (self.keys, self.values)
        )
        self.positions, self.votes = (
            self.positions.gather(1, keep),
            self.votes.gather(1, keep.repeat_interleave(group, 0)),
        )

    def merge(self, plan: MergePlan) -> None:
        """Overwrite slots that take something by the weighted sums of what goes in, entry by entry."""
        for part in (self.keys, self.values):
            before, started = part.clone(), set[tuple[int, int]]()
            for head in range(part.shape[0]):
                entries = zip(plan.src[0, head].tolist(), plan.dst[0, head].tolist(), plan.weight[0, head], strict=True)
                for src, dst, weight in entries:
                    if float(weight) == 0:
                        continue
                    if (head, dst) not in started:
                        part[head, dst] = 0
                        started.add((head, dst))
                    part[head, dst] += weight.double() * before[head, src]
