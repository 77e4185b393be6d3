"""Weights of one KV head, by its role: the maths of induction (Elhage et al. 2021; Olsson et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvtier.testing.induction.spec import HeadRole, InductionSpec

if TYPE_CHECKING:
    import torch

__all__ = ["HeadWeights", "Residual", "head_weights"]

_LOCAL_GAIN = 12.0
_LOCAL_PAIRS = slice(2, None)  # without the fastest two the window is smooth and some twenty tokens wide
_NOISE_GAIN = 24.0
_SINK_GAIN = 20.0


@dataclass(frozen=True, slots=True)
class Residual:
    """Where things stand in the residual stream: ``[code | previous code | output | constant | flag | texture]``."""

    spec: InductionSpec

    @property
    def code(self) -> slice:
        """Code of the token itself."""
        return slice(0, self.spec.code_dims)

    @property
    def previous(self) -> slice:
        """Code of the token before, written by the previous-token head."""
        return slice(self.spec.code_dims, 2 * self.spec.code_dims)

    @property
    def output(self) -> slice:
        """Code of the token to say next, written by the match head."""
        return slice(2 * self.spec.code_dims, 3 * self.spec.code_dims)

    @property
    def constant(self) -> int:
        """One, in every token."""
        return 3 * self.spec.code_dims

    @property
    def flag(self) -> int:
        """One in words without a code, the first token above all: what the sink heads look at."""
        return self.constant + 1

    @property
    def texture(self) -> slice:
        """Random signs of the token, of unit norm: what the idle heads compare and carry."""
        return slice(self.flag + 1, self.flag + 1 + self.spec.head_dim)

    @property
    def size(self) -> int:
        """Hidden size: the least multiple of ``Hq * D`` that holds everything."""
        unit = self.spec.num_query_heads * self.spec.head_dim
        return -(-(self.flag + 1 + self.spec.head_dim) // unit) * unit

    def energy(self, layer: int) -> float:
        """Squared norm of the stream before a layer (``num_layers``: after the last): one for each part written."""
        return 3.0 + (layer > 0) + (layer > self.spec.match_layer)


class HeadWeights(NamedTuple):
    """Projections of one KV head: query, key and value [D, hidden], output [hidden, D], and the logit gain."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    gain: float


def head_weights(role: HeadRole, spec: InductionSpec) -> HeadWeights:
    """Weights such that ``query . key`` is the wanted logit divided by ``gain``; idle roles have a zero output."""
    import torch

    at = Residual(spec)
    query, key, value = (torch.zeros(spec.head_dim, at.size) for _ in range(3))
    output = torch.zeros(at.size, spec.head_dim)
    gain = 0.0
    match role:
        case "previous":
            gain = spec.previous_gain
            _point_back(query, key, at, distance=1, pairs=slice(None))
            _carry_code(value, output, at.code, at.previous)
        case "match":
            gain = spec.match_gain
            dims = _slow_dims(spec)
            balance = torch.ones(spec.code_dims)
            balance[: spec.document_dims] = spec.needle_norm
            query[dims, at.code] = torch.diag(balance)
            key[dims, at.previous] = torch.diag(1 / balance)
            _carry_code(value, output, at.code, at.output)
        case "sink":
            gain = _SINK_GAIN
            query[-1, at.constant] = key[-1, at.flag] = 1.0
        case "local":
            gain = _LOCAL_GAIN
            _point_back(query, key, at, distance=0, pairs=_LOCAL_PAIRS)
        case "noise":
            gain = _NOISE_GAIN
            dims = _slow_dims(spec)
            one_to_one = torch.eye(spec.head_dim)
            query[dims, at.texture] = one_to_one[: spec.code_dims]
            key[dims, at.texture] = one_to_one.roll(1, dims=1)[: spec.code_dims]
    if role not in ("previous", "match"):
        value[:, at.texture] = torch.eye(spec.head_dim)
    return HeadWeights(query, key, value, output, gain)


def _slow_dims(spec: InductionSpec) -> list[int]:
    """Head dimension of each code dimension: both halves of the slow pairs, so that the last codes turn least."""
    half = spec.head_dim // 2
    return [pair + side for pair in range(spec.fast_pairs, half) for side in (0, half)]


def _point_back(query: torch.Tensor, key: torch.Tensor, at: Residual, *, distance: int, pairs: slice) -> None:
    """Attend to the token ``distance`` before: a fast pair that turns by w gives cos(w * (i - j - distance))."""
    half = at.spec.head_dim // 2
    for pair in range(at.spec.fast_pairs)[pairs]:
        turn = at.spec.inv_freq[pair]
        query[pair, at.constant] = 1.0
        key[pair, at.constant] = math.cos(turn * distance)
        key[pair + half, at.constant] = math.sin(turn * distance)


def _carry_code(value: torch.Tensor, output: torch.Tensor, source: slice, target: slice) -> None:
    """Copy one part of the attended token's stream to another part of the querying token's."""
    import torch

    size = source.stop - source.start
    value[:size, source] = torch.eye(size)
    output[target, :size] = torch.eye(size)
