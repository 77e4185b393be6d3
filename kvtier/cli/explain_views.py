"""What a page shows of an explanation: for each view, how much every token of the prompt was kept or read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from kvtier.core.explain import LayerExplanation
    from kvtier.core.policy import IntArray
    from kvtier.integrations.hf.explanation import Explanation

__all__ = ["LEVELS", "Shares", "View", "views_of"]

LEVELS: Final = 4
"""Steps between nothing (0) and all (4)."""

Shares = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """One way to look at the prompt.

    Parameters
    ----------
    title, summary : str
        What it is, and a sentence about it.
    shares : array
        [T] fp32 from 0 to 1: of each token.
    heads : tuple of array
        The shares of each KV head; none where the heads do not differ.
    """

    title: str
    summary: str
    shares: Shares
    heads: tuple[Shares, ...] = ()

    @property
    def levels(self) -> IntArray:
        """Shares [T] in ``LEVELS`` steps, rounded up: 0 only where nothing was kept or read."""
        levels: IntArray = np.ceil(self.shares * LEVELS - 1e-6).astype(np.int64)
        return levels

    def marked(self, most: int) -> tuple[IntArray, int]:
        """Levels [T] that change at most ``most`` times, each the highest of so many tokens: the second result."""
        levels, together = self.levels, 1
        while np.count_nonzero(np.diff(levels)) > most:
            together *= 2
            blocks = np.pad(self.levels, (0, -len(levels) % together)).reshape(-1, together)
            levels = blocks.max(1).repeat(together)[: len(levels)]
        return levels, together


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
        heads = np.zeros((len(layer.read or layer.kept), tokens), dtype=np.float32)
        heads[:, run] = _of_heads(layer, explanation.run.size)[:, : run.size]
        shares = heads.mean(axis=0)
        own = tuple(heads) if len(heads) > 1 else ()
        layers.append(View(title=f"layer {index}", summary=_summary(layer, shares), shares=shares, heads=own))
    if layers:
        mean: Shares = np.stack([view.shares for view in layers]).mean(axis=0)
        touched = int(np.count_nonzero(mean))
        summary = f"{touched} of {tokens} prompt tokens were kept and read somewhere, {mean.mean():.1%} on average"
        views.append(View(title="all layers, mean", summary=summary, shares=mean))
    return views + layers


def _of_heads(layer: LayerExplanation, tokens: int) -> Shares:
    """For each KV head, whether it holds each of ``tokens``, or the share of decode steps that read it [Hk, tokens]."""
    if layer.read is not None and layer.steps:
        heads = [_spread(runs, tokens) / layer.steps for runs in layer.read]
    else:
        heads = [_spread(np.insert(runs, 2, 1, axis=1), tokens) for runs in layer.kept]
    shares: Shares = np.clip(np.stack(heads), 0.0, 1.0).astype(np.float32)
    return shares


def _spread(runs: IntArray, tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Values [tokens] from runs [m, 3] of first, one past the last, and value; 0 elsewhere."""
    steps = np.zeros(tokens + 1)
    np.add.at(steps, np.minimum(runs[:, 0], tokens), runs[:, 2])
    np.add.at(steps, np.minimum(runs[:, 1], tokens), -runs[:, 2])
    return np.cumsum(steps)[:tokens]


def _summary(layer: LayerExplanation, shares: Shares) -> str:
    held = [int((runs[:, 1] - runs[:, 0]).sum()) for runs in layer.kept]
    kept = f"{min(held)} to {max(held)}" if min(held) != max(held) else str(held[0])
    text = f"{kept} tokens are held per KV head"
    if layer.read is not None and layer.steps:
        return f"{text}; a decode step read {shares.mean():.1%} of the prompt, mean of {layer.steps} steps"
    return f"{text}, and every step reads all of them"
