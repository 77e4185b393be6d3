"""The words of kvtier as types: layouts, budgets, partials. Standard library only."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvtier.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BYTES",
    "Budgets",
    "DTypeName",
    "GroupReduce",
    "KVLayout",
    "LayerLayout",
    "Partial",
    "Rope",
    "TierName",
    "Tree",
    "Visibility",
    "format_bytes",
    "parse_bytes",
]

GroupReduce = Literal["mean", "max", "sum"]
TierName = Literal["device", "host", "nvme"]
DTypeName = Literal["float64", "float32", "float16", "bfloat16"]

DTYPE_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


class Partial(NamedTuple):
    """Attention over a part of the keys: what merges.

    ``out`` [B, Hq, Tq, Dv] is normalised over its own keys; ``lse`` [B, Hq, Tq] is the natural logarithm of their
    summed
    exponentials. Both are fp32, or fp64 for fp64 inputs. A part without keys is ``(0, -inf)``.
    """

    out: torch.Tensor
    lse: torch.Tensor


class Visibility(NamedTuple):
    """Which key each query may see: causal by position, within ``window`` positions if one is set.

    Key j is visible to query i when ``k_pos[j] <= q_pos[i]`` and, with a window, ``k_pos[j] > q_pos[i] - window``.
    ``q_pos`` [B, Tq] and ``k_pos`` [B, Hk or 1, N] are int64.
    """

    q_pos: torch.Tensor
    k_pos: torch.Tensor
    window: int | None = None


class Tree(NamedTuple):
    """A tree of drafted tokens (speculative decoding): which of them each query may see.

    Key ``first + j`` is drafted token j of at most 64; query i sees it when bit j of ``ancestors[i]`` is set (its own
    bit is, as a rule) and its position allows it, too. Keys before ``first`` are seen by position alone.
    ``ancestors`` [B, Tq] is int64.
    """

    ancestors: torch.Tensor
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """How a layer rotates its queries and keys by their positions.

    Parameters
    ----------
    frequencies : tuple of float
        Radians a token of each of n pairs of channels (i, i + n); channels from 2n on are not rotated.
    scaling : float
        Factor of cosines and sines (YaRN).
    changes : str
        Why the frequencies depend on the length of the text; empty when they do not.
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0
    changes: str = ""

    def __post_init__(self) -> None:
        if self.scaling <= 0:
            raise ConfigError(f"scaling must be more than 0, got {self.scaling}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """Shape of the keys and values of one layer.

    Parameters
    ----------
    window : int, optional
        Sliding-window length W in tokens; None for a layer that sees everything.
    rope : Rope, optional
        How the model rotates keys before they come, for policies that undo it; None when that is not known. No part of
        the shape: layouts that differ in it alone are equal.
    """

    num_query_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: DTypeName
    window: int | None = None
    rope: Rope | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_query_heads", "num_kv_heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_query_heads must be a multiple of num_kv_heads, "
                f"got {self.num_query_heads} and {self.num_kv_heads}"
            )
        if self.rope is not None and 2 * len(self.rope.frequencies) > self.key_dim:
            raise ConfigError(f"{len(self.rope.frequencies)} rotated pairs do not fit key_dim {self.key_dim}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window must be at least 1 token or None, got {self.window}")

    @property
    def group_size(self) -> int:
        """Query heads per KV head, G."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all KV heads."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Shape of the KV cache of a whole model.

    Parameters
    ----------
    page_tokens : int
        Slots P of a page, the unit of selection and gather.
    block_tokens : int
        Tokens sealed together; a multiple of ``page_tokens``.
    chunk_tokens : int
        Tokens of a prefix key; a multiple of ``block_tokens``.
    """

    layers: tuple[LayerLayout, ...]
    page_tokens: int = 16
    block_tokens: int = 64
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a layout needs at least one layer, got none")
        if self.page_tokens < 1:
            raise ConfigError(f"page_tokens must be at least 1, got {self.page_tokens}")
        for big, small in (("block_tokens", "page_tokens"), ("chunk_tokens", "block_tokens")):
            if getattr(self, big) < 1 or getattr(self, big) % getattr(self, small):
                raise ConfigError(
                    f"{big} must be a positive multiple of {small} ({getattr(self, small)}), got {getattr(self, big)}"
                )

    @classmethod
    def uniform(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: DTypeName,
        num_query_heads: int | None = None,
        page_tokens: int = 16,
        block_tokens: int = 64,
        chunk_tokens: int = 256,
    ) -> KVLayout:
        """Layout of a model whose layers are all alike; ``num_query_heads`` defaults to ``num_kv_heads``."""
        layer = LayerLayout(
            num_query_heads=num_query_heads or num_kv_heads,
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dtype=dtype,
        )
        return cls(
            layers=(layer,) * num_layers,
            page_tokens=page_tokens,
            block_tokens=block_tokens,
            chunk_tokens=chunk_tokens,
        )

    @classmethod
    def of(cls, model: object) -> KVLayout:
        """Layout of a transformers model.

        Raises
        ------
        UnsupportedModelError
            With the reason, for a model that kvtier cannot serve.
        """
        # By name: this module loads nothing but the standard library.
        layout: KVLayout = importlib.import_module("kvtier.integrations.hf.layout").layout_of(model)
        return layout

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers and KV heads."""
        return sum(layer.token_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What a session may use; None means no bound.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per sequence, layer and KV head (eviction).
    read : int, optional
        Tokens read per decode step, layer and KV head (retrieval).
    device : int, optional
        Bytes of device memory, on each device.
    """

    keep: int | None = None
    read: int | None = None
    device: int | None = None

    def __post_init__(self) -> None:
        for name, unit in (("keep", "tokens"), ("read", "tokens"), ("device", "bytes")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 ({unit}), got {value}; leave it out for no bound")


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as ``"64MiB"``, ``"1.5GB"`` or an integer of bytes.

    Raises
    ------
    ConfigError
        For anything else, and for sizes below one byte.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"a size is an integer of bytes or text such as '64MiB' or '1.5GB', got {size!r}")
        count = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if count < 1:
        raise ConfigError(f"a size must be at least 1 byte, got {size!r}")
    return count


def format_bytes(count: int) -> str:
    """A size that a person reads: ``format_bytes(1536) == '1.5 KiB'``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
