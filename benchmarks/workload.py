"""The work: Llama-3-8B's attention shape, random keys and values, and sessions filled as a prefill would leave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvtier.types import DTYPE_BYTES, DTypeName, KVLayout

if TYPE_CHECKING:
    from kvtier.core.session import Session

__all__ = ["KV", "Shape", "Token", "decode_token", "feed_generated", "feed_prompt", "random_kv"]

_VOTERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Attention of one layer; the defaults are those of Llama 3 8B."""

    dtype: DTypeName
    device: str = "cpu"
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of keys, values and queries."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def scale(self) -> float:
        """Factor of q.k."""
        return float(self.head_dim**-0.5)

    def layout(self, layers: int) -> KVLayout:
        """The layout of a model of so many such layers."""
        return KVLayout.uniform(
            num_layers=layers,
            num_query_heads=self.query_heads,
            num_kv_heads=self.kv_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            dtype=self.dtype,
        )

    def queries(self, tokens: int) -> torch.Tensor:
        """Random queries [1, Hq, tokens, D]."""
        return torch.randn(1, self.query_heads, tokens, self.head_dim, dtype=self.torch_dtype, device=self.device)


class KV(NamedTuple):
    """Keys and values of one layer, each [1, Hk, T, D]."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens T."""
        return self.keys.shape[2]

    def split(self, last: int) -> tuple[KV, KV]:
        """Views of all tokens but the ``last``, and copies of those."""
        first = self.tokens - last
        head = KV(self.keys[:, :, :first], self.values[:, :, :first])
        return head, KV(self.keys[:, :, first:].clone(), self.values[:, :, first:].clone())


class Token(NamedTuple):
    """What one decode step brings to a layer: q [1, Hq, 1, D], k and v [1, Hk, 1, D], positions [1, 1]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor


def random_kv(shape: Shape, tokens: int) -> KV:
    """Normally distributed keys and values."""
    size = (1, shape.kv_heads, tokens, shape.head_dim)
    keys, values = (torch.randn(size, dtype=shape.torch_dtype, device=shape.device) for _ in range(2))
    return KV(keys, values)


def decode_token(shape: Shape, position: int) -> Token:
    """A random token at a position."""
    return Token(shape.queries(1), *random_kv(shape, 1), torch.tensor([[position]], device=shape.device))


def feed_prompt(session: Session, layer: int, prompt: KV, shape: Shape) -> None:
    """Append an announced prompt to one layer; its last queries attend, so that eviction acts."""
    positions = torch.arange(prompt.tokens, device=shape.device)[None]
    session.append(layer, prompt.keys, prompt.values, positions)
    last = positions[:, -_VOTERS:]
    session.attend(layer, shape.queries(last.shape[1]), last, scale=shape.scale)


def feed_generated(session: Session, layers: Sequence[KV]) -> None:
    """Append tokens one at a time to all layers in turn, so that their pages lie as decoding leaves them."""
    for at in range(layers[0].tokens):
        positions = torch.tensor([[session.length]], device=layers[0].keys.device)
        for layer, tail in enumerate(layers):
            session.append(layer, tail.keys[:, :, at : at + 1], tail.values[:, :, at : at + 1], positions)
