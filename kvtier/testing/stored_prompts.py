"""Prompts whose keys and values follow from their tokens, in chunks of a small layout: what tests put into a store."""
# ruff: noqa: S101 - checks for tests are made of assert

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from kvtier.core.chunks import KVChunk
from kvtier.core.namespace import Namespace
from kvtier.core.store import Store
from kvtier.types import KVLayout

__all__ = ["HOST_TIER", "LAYOUT", "assert_loaded", "chunks_of", "keys_and_values", "nvme_tier", "space"]

_MIB: Final = 1 << 20

LAYOUT: Final = KVLayout.uniform(
    num_layers=3, num_kv_heads=2, key_dim=4, value_dim=6, dtype="float32", page_tokens=2, block_tokens=4, chunk_tokens=8
)
HOST_TIER: Final[dict[str, Any]] = {"name": "host", "backend": "host", "capacity": 4 * _MIB}


def nvme_tier(path: Path, backend: str = "segment") -> dict[str, Any]:
    """Settings of a tier of files."""
    return {"name": "nvme", "backend": backend, "path": str(path), "capacity": 16 * _MIB}


def keys_and_values(tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [L, Hk, T, Dk] and values that follow from the tokens before them, as a model's do."""
    shape = LAYOUT.layers[0]
    k = torch.empty(len(LAYOUT.layers), shape.num_kv_heads, len(tokens), shape.key_dim)
    v = torch.empty(len(LAYOUT.layers), shape.num_kv_heads, len(tokens), shape.value_dim)
    state = 1
    for place, token in enumerate(tokens):
        state = (state * 31 + token) % 10007
        k[:, :, place] = torch.arange(k[:, :, 0].numel()).view_as(k[:, :, 0]) + state
        v[:, :, place] = -torch.arange(v[:, :, 0].numel()).view_as(v[:, :, 0]) - state
    return k, v


def chunks_of(tokens: Sequence[int]) -> list[KVChunk]:
    """The full chunks of a prompt."""
    return KVChunk.split(*keys_and_values(tokens), LAYOUT.chunk_tokens)


def assert_loaded(chunks: Sequence[KVChunk], tokens: Sequence[int], layers: Sequence[int] | None = None) -> None:
    """The chunks are the first ones of the tokens."""
    k, v = keys_and_values(tokens)
    size = LAYOUT.chunk_tokens
    for number, chunk in enumerate(chunks):
        span = slice(number * size, (number + 1) * size)
        for place, layer in enumerate(range(len(LAYOUT.layers)) if layers is None else layers):
            assert torch.equal(chunk.k[place], k[layer, :, span])
            assert torch.equal(chunk.v[place], v[layer, :, span])


def space(store: Store, tenant: str = "default", model: str = "model") -> Namespace:
    """Where a tenant's prompts of a model lie."""
    return store.namespace(model=model, layout=LAYOUT, tenant=tenant)
