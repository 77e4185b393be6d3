"""kvtier's policies on a patched model, for `worker.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
import transformers

import kvtier

POLICIES: Final[dict[str, str]] = {
    "full": "full",
    "streamingllm": "streamingllm(sinks=4)",
    "snapkv": "snapkv(window=32, kernel=7)",
    "pyramidkv": "pyramidkv(window=32, kernel=7)",
    "tova": "tova",
    "h2o": "h2o(recent=64)",
    "adakv": "adakv(window=32, kernel=7, alpha=0.2)",
    "expected attention": "expected_attention",
}


class Generation:
    """One cache under a policy."""

    def __init__(self, model: Any, handle: Any) -> None:
        self._model, self._cache = model, handle.new_cache()

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """A prompt at once."""
        return self.step(ids)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """One more forward."""
        logits: torch.Tensor = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1).logits
        return logits[0, -1]

    def kv_bytes(self) -> int:
        """Bytes that the memory holds from the system: pages, tails, slots and statistics."""
        nbytes: int = self._cache.session.report().bytes["device"].allocated
        return nbytes


class Runner:
    """The model, patched anew for every generation."""

    def __init__(self, folder: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    @contextmanager
    def open(self, method: str, keep: int, tokens: int) -> Iterator[Generation]:
        """Patch, with a budget unless all is kept."""
        budget = {} if method == "full" else {"keep": keep}
        store = {"tiers": [{"name": "host", "backend": "host", "capacity": "64MiB"}]}
        with kvtier.patch(self._model, POLICIES[method], store=store, **budget) as handle:
            yield Generation(self._model, handle)

    def versions(self) -> dict[str, str]:
        """kvtier, transformers and torch."""
        return {name: version(name) for name in ("kvtier", "transformers", "torch")}
