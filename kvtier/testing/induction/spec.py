"""Shape of the induction model: which KV head does what, and which RoPE pairs carry what. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kvtier.errors import ConfigError

__all__ = ["HeadRole", "InductionSpec"]

HeadRole = Literal["previous", "match", "sink", "local", "noise"]

_IDLE: tuple[HeadRole, ...] = ("noise", "local", "sink")
_MIN_FAST_PAIRS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class InductionSpec:
    """Hyper-parameters of a Llama whose weights are set by hand so that it performs induction.

    Parameters
    ----------
    num_layers : int
        L. The previous-token head sits in layer 0, the match head in layer ``num_layers // 2``; the rest is idle.
    num_query_heads, num_kv_heads : int
        Hq and Hk. The query heads of one KV head play the same role, each softer than the one before.
    head_dim : int
        D = Dk = Dv, even.
    max_positions : int
        Tokens over which a match must hold.
    rope_theta : float
        RoPE base. Pairs that turn by less than ``slow_turn`` over ``max_positions`` carry words, the others distance.
    slow_turn : float
        Radians.
    hot : int
        Code dimensions that are on for a word; a code has unit norm. Powers of four are exact in bf16.
    needle_dims : int
        Code dimensions that belong to the needle words, taken from the slowest pairs; document words use the others.
    max_words : int
        Words of the document that get a token of their own; rarer ones are unknown.
    previous_gain : float
        Logit of one RoPE pair in the previous-token head, at a distance of one token.
    match_gain : float
        Logit of a match. Two words share at most ``hot - 1`` dimensions: the margin is at least ``match_gain / hot``.
    needle_norm : float
        Norm of a needle word's match key over that of a document word, whose queries make up for it: the few needle
        keys then span the first principal directions, and a low-rank codec keeps them.
    seed : int
        Which word gets which code.

    Raises
    ------
    ConfigError
        For sizes that leave no room for the codes.
    """

    num_layers: int = 4
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    max_positions: int = 131072
    rope_theta: float = 1e24
    slow_turn: float = 0.35
    hot: int = 4
    needle_dims: int = 16
    max_words: int = 30000
    previous_gain: float = 40.0
    match_gain: float = 128.0
    needle_norm: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_query_heads", "num_kv_heads", "max_positions", "hot", "needle_dims", "max_words"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rope_theta", "slow_turn", "previous_gain", "match_gain", "needle_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.num_layers < 2:
            raise ConfigError(f"induction needs num_layers of at least 2, got {self.num_layers}")
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                "num_query_heads must be a multiple of num_kv_heads, "
                f"got {self.num_query_heads} and {self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim must be even and at least 2, got {self.head_dim}")
        self._check_room()

    def _check_room(self) -> None:
        """Refuse heads whose RoPE pairs cannot carry both distance and words."""
        if self.fast_pairs < _MIN_FAST_PAIRS:
            raise ConfigError(
                f"at least {_MIN_FAST_PAIRS} RoPE pairs must turn by slow_turn or more over max_positions, "
                f"got {self.fast_pairs}; lower rope_theta or slow_turn, or raise head_dim"
            )
        for name, dims in (("needle_dims", self.needle_dims), ("document_dims", self.document_dims)):
            if dims < self.hot:
                raise ConfigError(
                    f"{name} must be at least hot ({self.hot}), got {dims}; raise rope_theta or head_dim, or change "
                    "needle_dims or hot"
                )
        codes = math.comb(self.document_dims, self.hot)
        if codes < self.max_words:
            raise ConfigError(
                f"max_words must be at most {codes}, the choices of {self.hot} from {self.document_dims} dimensions, "
                f"got {self.max_words}; lower it or needle_dims, or raise head_dim"
            )

    @property
    def inv_freq(self) -> tuple[float, ...]:
        """Radians per token of the D/2 RoPE pairs, fastest first."""
        return tuple(self.rope_theta ** (-2 * pair / self.head_dim) for pair in range(self.head_dim // 2))

    @property
    def fast_pairs(self) -> int:
        """RoPE pairs that carry distance: those that turn by ``slow_turn`` or more over ``max_positions``."""
        return sum(turn * self.max_positions >= self.slow_turn for turn in self.inv_freq)

    @property
    def code_dims(self) -> int:
        """Dimensions of a word's code: both halves of every slow RoPE pair."""
        return self.head_dim - 2 * self.fast_pairs

    @property
    def document_dims(self) -> int:
        """Code dimensions of the document words."""
        return self.code_dims - self.needle_dims

    @property
    def match_layer(self) -> int:
        """Layer of the match head."""
        return self.num_layers // 2

    def role(self, layer: int, kv_head: int) -> HeadRole:
        """What one KV head does; idle heads attend to something and write nothing."""
        if layer == 0 and kv_head == 0:
            return "previous"
        if layer == self.match_layer and kv_head == self.num_kv_heads - 1:
            return "match"
        return _IDLE[(2 * layer + kv_head) % len(_IDLE)]
