"""A session of a prompt's first run: some layers, no policy, and what one query makes of the keys of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvtier.core.attention import summed_logits
from kvtier.core.batch import Batch
from kvtier.core.prompt import PromptTracker
from kvtier.core.session import Session

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["ProbeSession"]


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
            return [summed_logits(row[layer], query[number]) for number, row in enumerate(self._batch.rows)]
