"""Which tokens of a generation were run, and what each layer held and read of them, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from kvtier.core.explain import LayerExplanation
from kvtier.errors import InputError, SessionStateError

if TYPE_CHECKING:
    from kvtier.core.policy import IntArray
    from kvtier.core.session import Session
    from kvtier.integrations.hf.state import CacheState

__all__ = ["Explanation", "explain_rows"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """What a policy did to one row of a generation.

    Parameters
    ----------
    policy : str
        Its name, prompt filter included.
    token_ids : array
        Tokens of the row without padding [T] int64: the prompt as it was given, and what was generated and fed again.
    run : array
        Which of them the whole model ran [K] int64, ascending; all without a prompt filter.
    votes : array, optional
        What a prompt filter judged its tokens by [prompt tokens] fp32; None without one, and when it left all in place.
    layers : tuple of LayerExplanation
        Layer by layer; position p is token ``run[p]``.
    """

    policy: str
    token_ids: IntArray
    run: IntArray
    votes: np.ndarray[tuple[int], np.dtype[np.float32]] | None
    layers: tuple[LayerExplanation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {
            "policy": self.policy,
            "token_ids": self.token_ids.tolist(),
            "run": self.run.tolist(),
            "votes": None if self.votes is None else self.votes.tolist(),
            "layers": [layer.to_dict() for layer in self.layers],
        }


def explain_rows(state: CacheState, policy: str) -> tuple[Explanation, ...]:
    """Every row of a cache.

    Raises
    ------
    SessionStateError
        When its tokens came as embeddings.
    InputError
        When positions do not count its tokens.
    """
    if state.history.ids is None:
        raise SessionStateError("tokens that came as embeddings cannot be told; give input_ids")
    return tuple(_explain(state, policy, row) for row in range(state.history.rows))


def _explain(state: CacheState, policy: str, row: int) -> Explanation:
    history, filtered = state.history, state.filtered
    real, ids = history.real[row], cast("torch.Tensor", history.ids)[row]
    positions = history.positions[row][real]
    if not torch.equal(positions, torch.arange(positions.numel())):
        raise InputError("positions were given that do not count the tokens of a row from 0; leave position_ids out")
    layers = cast("Session", state.session).explain(row)
    if filtered is None:
        fed = ids[real].numpy().copy()
        return Explanation(policy=policy, token_ids=fed, run=np.arange(fed.size), votes=None, layers=layers)
    after = ids[filtered.run.columns :][real[filtered.run.columns :]]
    given = torch.cat([filtered.given.row(row), after])
    run = torch.cat([filtered.kept[row], torch.arange(given.numel() - after.numel(), given.numel())])
    votes = filtered.votes[row].numpy().copy() if filtered.votes else None
    return Explanation(policy=policy, token_ids=given.numpy(), run=run.numpy(), votes=votes, layers=layers)
