"""Tokens that another session prefilled, put back into an empty one without attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.core.ring import WindowSequence
from kvtier.errors import SessionStateError

if TYPE_CHECKING:
    from kvtier.core.batch import Batch

__all__ = ["Restoration"]


class Restoration:
    """Fills the rows of an empty session, a layer and some tokens at a time; made by ``Session.restoring``.

    Blocks are sealed, sketched and moved down as if the tokens had been prefilled here. The session is of no use
    before ``Session.restored``; after an error it can only be closed.

    Notes
    -----
    Each call takes the lock of the memory for itself, so that other sessions run between them.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(self, row: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add the next tokens K [Hk, n, Dk], V [Hk, n, Dv] of a row, at the positions that follow.

        Raises
        ------
        CapacityError
            When no tier has room.
        """
        tokens = keys.shape[1]
        step = self._batch.memory.max_prefill_chunk(1) or max(1, tokens)
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            self._append_part(row, layer, keys[:, part], values[:, part])

    def _append_part(self, row: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The same for no more tokens than the device has room for beside its pages."""
        memory = self._batch.memory
        device = memory.devices[layer]
        with memory.lock, memory.ledgers[device].lent("raw", keys.nbytes + values.nbytes):
            sequence = self._batch.rows[row][layer]
            first = sequence.seen if isinstance(sequence, WindowSequence) else sequence.length
            positions = np.arange(first, first + keys.shape[1], dtype=np.int64)[None]
            sequence.append(keys.to(device), values.to(device), positions)
            if isinstance(sequence, WindowSequence):
                sequence.settle()
            else:
                sequence.group.store.write_behind(sequence.group.low_water())

    def pass_over(self, row: int, layer: int, tokens: int) -> None:
        """The first ``tokens`` of a row are out of sight of the rest: a sliding-window layer needs their number only.

        Raises
        ------
        SessionStateError
            For a layer that sees everything, or holds tokens already.
        """
        with self._batch.memory.lock:
            sequence = self._batch.rows[row][layer]
            if not isinstance(sequence, WindowSequence):
                raise SessionStateError(f"layer {layer} has no sliding window: it needs all tokens")
            sequence.pass_over(tokens)

    @torch.inference_mode(False)
    def share(self, source: int, row: int) -> None:
        """Row ``row``, still empty, starts as a fork of row ``source``."""
        with self._batch.memory.lock:
            for layer, sequence in enumerate(self._batch.rows[source]):
                self._batch.rows[row][layer].release()
                self._batch.rows[row][layer] = sequence.fork()

    def check(self, tokens: Sequence[int]) -> None:
        """Refuse rows that do not hold ``tokens[b]`` tokens in every layer.

        Raises
        ------
        SessionStateError
        """
        for row, (sequences, due) in enumerate(zip(self._batch.rows, tokens, strict=True)):
            for layer, sequence in enumerate(sequences):
                held = sequence.seen if isinstance(sequence, WindowSequence) else sequence.length
                if held != due:
                    raise SessionStateError(f"row {row} must hold {due} tokens in layer {layer}, got {held}")
