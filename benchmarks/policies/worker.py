"""Run methods on one model in the environment that they need, a JSON object a line; whatever is timed is timed here.

``python -P worker.py RUNNER.py``: the runner has a class ``Runner``, made from a folder with a model, that opens a
`Generation` for a method. `benchmarks.policies.side` asks.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import torch


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


def _load(path: Path) -> Callable[[Path], Runner]:
    spec = importlib.util.spec_from_file_location("runner", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Callable[[Path], Runner]", module.Runner)


def _answers() -> TextIO:
    """The pipe to the driver; whatever else is printed, by any library, goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Answer until the input ends."""
    answers = _answers()
    server = Server(_load(Path(sys.argv[1])))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - whatever a method raises is a result
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
