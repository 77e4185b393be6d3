"""Stock transformers: its ``sdpa`` attention function over the tensors of its DynamicCache."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.registry import BenchmarkError
from benchmarks.workload import KV, Shape, Token

__all__ = ["StockLayer"]


class _Module(torch.nn.Module):
    """All that the function asks of an attention module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups: int = groups


class StockLayer:
    """One layer of a DynamicCache, filled with a prompt, and the attention function that models call by default.

    Attributes
    ----------
    held : KV
        The cached keys and values, [1, Hk, T, D].
    """

    def __init__(self, prompt: KV, shape: Shape) -> None:
        self._layer = DynamicLayer()
        self._layer.update(*prompt)
        self._scale = shape.scale
        self._module = _Module(shape.query_heads // shape.kv_heads)

    @property
    def held(self) -> KV:
        """Keys and values now."""
        keys, values = self._layer.keys, self._layer.values
        if keys is None or values is None:
            raise BenchmarkError("the stock cache must be filled, got an empty one")
        return KV(keys, values)

    def step(self, token: Token) -> torch.Tensor:
        """Update the cache and attend -> [1, Hq, 1, D]."""
        self._layer.update(token.key, token.value)
        return self.attend(token.query)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Attend to what is cached already -> [1, Hq, 1, D]; a single query without padding gets no mask."""
        out, _ = sdpa_attention_forward(self._module, query, *self.held, None, scaling=self._scale)
        return out.transpose(1, 2)
