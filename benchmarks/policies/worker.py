"""Run methods on one model in the environment that they need; whatever is timed is timed here.

`answering.py` loads it, and a runner with a class ``Runner``, made from a folder with a model, that opens a
`Generation` for a method; `benchmarks.policies.side` asks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol

import torch

RUNS: Final = "Runner"
"""The class of a runner that a `Server` is made from."""


class Generation(Protocol):
    """A prompt and what follows it, under one method."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [V] after a prompt [1, T]."""

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [V] after one more token [1, 1]."""

    def kv_bytes(self) -> int:
        """Bytes that keys, values and what was kept beside them occupy now."""


class Runner(Protocol):
    """A model and the methods of one library."""

    def open(self, method: str, keep: int, tokens: int) -> AbstractContextManager[Generation]:
        """Keep ``keep`` of the ``tokens`` of a prompt per KV head."""

    def versions(self) -> dict[str, str]:
        """What computes here."""


class Server:
    """One runner, and the logits of the whole cache, which the others are compared with."""

    def __init__(self, factory: Callable[[Path], Runner]) -> None:
        self._factory = factory
        self._runner: Runner | None = None
        self._whole: dict[tuple[int, ...], torch.Tensor] = {}

    def load(self, *, folder: str) -> dict[str, Any]:
        """Load the model of a folder."""
        self._runner, self._whole = self._factory(Path(folder)), {}
        return {"versions": self._runner.versions()}

    def run(self, *, method: str, keep: int, ids: Sequence[int], feed: Sequence[int]) -> dict[str, Any]:
        """A prompt, then the tokens of ``feed`` one by one, whatever the method would have said."""
        if self._runner is None:
            raise RuntimeError("no model is loaded; send load first")
        prompt = torch.tensor([list(ids)])
        gc.collect()
        gc.disable()
        try:
            with torch.no_grad(), self._runner.open(method, keep, len(ids)) as generation:
                prefill, logits = _timed(generation.prefill, prompt)
                seen, seconds = [logits], []
                for token in feed:
                    elapsed, logits = _timed(generation.step, torch.tensor([[token]]))
                    seconds.append(elapsed)
                    seen.append(logits)
                nbytes = generation.kv_bytes()
        finally:
            gc.enable()
        said = torch.stack(seen).double().log_softmax(-1)
        if method == "full":
            self._whole[tuple(ids)] = said
        whole = self._whole.get(tuple(ids))
        told: dict[str, Any] = {"prefill_s": prefill, "decode_s": seconds, "kv_bytes": nbytes}
        told["tokens"] = said.argmax(-1).tolist()
        if whole is not None and whole.shape == said.shape:
            told["same_tokens"] = float((whole.argmax(-1) == said.argmax(-1)).double().mean())
            told["divergence"] = float((whole.exp() * (whole - said)).sum(-1).mean())
        return told


def _timed(function: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    begun = time.perf_counter()
    logits = function(ids)
    return time.perf_counter() - begun, logits
