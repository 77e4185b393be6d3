"""kvpress's presses, each as its users run it, for ``benchmarks/policies/worker.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import kvpress
import torch
import transformers

PRESSES: Final[dict[str, Callable[[], Any]]] = {
    "streamingllm": lambda: kvpress.StreamingLLMPress(n_sink=4),
    "snapkv": lambda: kvpress.SnapKVPress(window_size=32, kernel_size=7),
    "pyramidkv": lambda: kvpress.PyramidKVPress(window_size=32, kernel_size=7),
    "tova": kvpress.TOVAPress,
    "h2o": kvpress.ObservedAttentionPress,
    "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(window_size=32, kernel_size=7), alpha_safeguard=0.2),
    "expected attention": kvpress.ExpectedAttentionPress,
}
_EAGER: Final = frozenset({"h2o"})  # asks for the matrix of all weights


class Generation:
    """A stock cache that a press compresses at the end of the prompt."""

    def __init__(self, model: Any, press: Any) -> None:
        self._model, self._press, self._seen = model, press, 0
        self._cache = transformers.DynamicCache()

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """A prompt at once, under the press."""
        if self._press is None:
            return self.step(ids)
        with self._press(self._model):
            return self.step(ids)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """One more forward, at the position that follows whatever was dropped."""
        positions = torch.arange(self._seen, self._seen + ids.shape[1])[None]
        self._seen += ids.shape[1]
        told = self._model(input_ids=ids, past_key_values=self._cache, position_ids=positions, logits_to_keep=1)
        logits: torch.Tensor = told.logits
        return logits[0, -1]

    def kv_bytes(self) -> int:
        """Bytes of the memory under the tensors of the cache."""
        held = {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for layer in self._cache.layers
            for part in (layer.keys, layer.values)
        }
        return sum(held.values())


class Runner:
    """The stock model."""

    def __init__(self, folder: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    @contextmanager
    def open(self, method: str, keep: int, tokens: int) -> Iterator[Generation]:
        """A press for this budget; half a token more, because the ratio is rounded down to tokens."""
        press = PRESSES[method]() if method in PRESSES else None
        if press is not None:
            press.compression_ratio = 1 - (keep + 0.5) / tokens
        self._model.set_attn_implementation("eager" if method in _EAGER else "sdpa")
        try:
            yield Generation(self._model, press)
        finally:
            for layer in self._model.model.layers:
                layer.self_attn.masked_key_indices = None

    def versions(self) -> dict[str, str]:
        """kvpress, transformers and torch."""
        return {name: version(name) for name in ("kvpress", "transformers", "torch")}
