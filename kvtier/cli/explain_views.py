"""What a page shows of an explanation: for each view, how much every token of the prompt was kept or read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from kvtier.core.explain import LayerExplanation
    from kvtier.core.policy import IntArray
    from kvtier.integrations.hf.explanation import Explanation

__all__ = ["LEVELS", "View", "views_of"]

LEVELS: Final = 4
"""Steps between nothing (0) and all (4)."""

_Shares = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """One way to look at the prompt.

    Parameters
    ----------
    title, summary : str
        What it is, and a sentence about it.
    shares : array
        [T] fp32 from 0 to 1: of each token.
    """

    title: str
    summary: str
    shares: _Shares

    @property
    def levels(self) -> IntArray:
        """Shares [T] in ``LEVELS`` steps, rounded up: 0 only where nothing was kept or read."""
        levels: IntArray = np.ceil(self.shares * LEVELS - 1e-6).astype(np.int64)
        return levels


def views_of(explanation: Explanation, tokens: int) -> list[View]:
    """The views of a prompt of ``tokens``: what was run, the mean of all layers, and each layer."""
    views = []
    run = explanation.run[explanation.run < tokens]
    if run.size < tokens:
        shares = np.zeros(tokens, dtype=np.float32)
        shares[run] = 1.0
        views.append(
            View(title="prompt filter", summary=f"{run.size} of {tokens} prompt tokens were run", shares=shares)
        )
    layers = []
    for index, layer in enumerate(explanation.layers):
        shares = np.zeros(tokens, dtype=np.float32)
        shares[run] = _mean_of_heads(layer, explanation.run.size)[: run.size]
        layers.append(View(title=f"layer {index}", summary=_summary(layer, shares), shares=shares))
    if layers:
        mean: _Shares = np.stack([view.shares for view in layers]).mean(axis=0)
        touched = int(np.count_nonzero(mean))
        summary = f"{touched} of {tokens} prompt tokens were kept and read somewhere, {mean.mean():.1%} on average"
        views.append(View(title="all layers, mean", summary=summary, shares=mean))
    return views + layers


def _mean_of_heads(layer: LayerExplanation, tokens: int) -> _Shares:
    """The share of KV heads that hold each of ``tokens``, or of decode steps that read it, mean over the heads."""
    if layer.read is not None and layer.steps:
        heads = [_spread(runs, tokens) / layer.steps for runs in layer.read]
    else:
        heads = [_spread(np.insert(runs, 2, 1, axis=1), tokens) for runs in layer.kept]
    shares: _Shares = np.clip(np.mean(heads, axis=0), 0.0, 1.0).astype(np.float32)
    return shares


def _spread(runs: IntArray, tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Values [tokens] from runs [m, 3] of first, one past the last, and value; 0 elsewhere."""
    steps = np.zeros(tokens + 1)
    np.add.at(steps, np.minimum(runs[:, 0], tokens), runs[:, 2])
    np.add.at(steps, np.minimum(runs[:, 1], tokens), -runs[:, 2])
    return np.cumsum(steps)[:tokens]


def _summary(layer: LayerExplanation, shares: _Shares) -> str:
    held = [int((runs[:, 1] - runs[:, 0]).sum()) for runs in layer.kept]
    kept = f"{min(held)} to {max(held)}" if min(held) != max(held) else str(held[0])
    text = f"{kept} tokens are held per KV head"
    if layer.read is not None and layer.steps:
        return f"{text}; a decode step read {shares.mean():.1%} of the prompt, mean of {layer.steps} steps"
    return f"{text}, and every step reads all of them"
