"""A session of a prompt's first run: some layers, no policy, and what one query makes of the keys of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvtier.core.attention import AnySequence, segments_of
from kvtier.core.batch import Batch
from kvtier.core.prompt import PromptTracker
from kvtier.core.session import Session

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["ProbeSession", "run_logits"]

_PIECE = 4096
"""Keys whose fp32 copies are made at once."""


class ProbeSession(Session):
    """The first layers of a model under no policy, in the tiers of its memory; made by ``Memory.probe()``.

    Parameters
    ----------
    layers : int
        How many are appended to. The last of them need not attend.
    columns : int
        Columns of the prompt.
    """

    def __init__(self, memory: Memory, *, layers: int, columns: int) -> None:
        super().__init__(memory)
        self._batch = Batch(memory, [], PromptTracker(), probing=layers)
        self._columns = [0] * layers
        # One column more than there will be: a prompt that never ends is not evicted, nor decoded after.
        self.expect(columns + 1)

    @torch.no_grad()
    def logits(self, layer: int, query: torch.Tensor) -> list[torch.Tensor]:
        """q.k of one query a row [B, Hq, 1, Dk] with all keys of a layer, without scale, summed over the query heads.

        Returns
        -------
        list of Tensor
            [slots] fp32 of each row, in the order of the slots.
        """
        with self.memory.lock:
            return [_logits(row[layer], query[number]) for number, row in enumerate(self._batch.rows)]


def _logits(sequence: AnySequence, query: torch.Tensor) -> torch.Tensor:
    """q.k of one query [Hq, 1, Dk] with every slot, without scale, summed over the query heads: [slots] fp32."""
    logits = torch.empty(sequence.length, dtype=torch.float32, device=query.device)
    with segments_of(sequence) as segments:
        for segment in segments:
            run_logits(query, segment.keys[0], logits[segment.start : segment.stop])
    return logits


def run_logits(query: torch.Tensor, keys: torch.Tensor, out: torch.Tensor) -> None:
    """The same for a run of keys [Hk, n, Dk], a piece at a time, into ``out`` [n]."""
    # The sum over a group's queries comes first: one vector a KV head.
    summed = query[:, 0].float().unflatten(0, (keys.shape[0], -1)).sum(1)
    for start in range(0, keys.shape[1], _PIECE):
        piece = slice(start, start + _PIECE)
        out[piece] = torch.einsum("hd,hnd->n", summed, keys[:, piece].float())
