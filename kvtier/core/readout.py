"""Tokens of a sequence as they were appended, read out of whatever tier holds them, in order to be stored."""

from __future__ import annotations

import torch

from kvtier.core.kept import KeptSequence
from kvtier.core.policy import IntArray
from kvtier.core.ragged import RaggedSequence
from kvtier.core.ring import WindowSequence
from kvtier.core.sequence import LayerSequence

__all__ = ["read_tokens"]


def read_tokens(
    sequence: LayerSequence | WindowSequence | KeptSequence | RaggedSequence,
    start: int,
    stop: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> bool:
    """Copy tokens ``start`` to ``stop`` of a sequence, counted from its first, in whatever tier they live.

    Parameters
    ----------
    start, stop : int
        Multiples of the page size, among sealed tokens; any tokens of a sliding window.
    keys, values : Tensor
        [Hk, stop - start, Dk] and [Hk, stop - start, Dv], filled.

    Returns
    -------
    bool
        False when some were evicted, slid out of a window, or are not sealed yet; nothing can be said of them then.

    Raises
    ------
    CapacityError, PagesLostError
        When they must be fetched, and there is no room for that or they are gone; the sequence stays as it was.
    """
    if isinstance(sequence, WindowSequence):
        held = sequence.read(start, stop)
        if held is None:
            return False
        keys.copy_(held[0])
        values.copy_(held[1])
        return True
    if isinstance(sequence, (KeptSequence, RaggedSequence)):
        return False
    page = sequence.group.page_tokens
    if sequence.evicted_length or stop > sequence.sealed or start % page or stop % page:
        return False
    _read_pages(sequence, sequence.pages.view[:, start // page : stop // page], keys, values)
    return True


def _read_pages(sequence: LayerSequence, pages: IntArray, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Copy pages [Hk, n] to ``keys`` [Hk, n * P, Dk] and ``values``."""
    group, store, page = sequence.group, sequence.group.store, sequence.group.page_tokens
    if store.resident(pages).all():
        runs, rest = store.arena.runs(store.frames(pages))
        if not rest.size:
            for run in runs:
                span = slice(run.start * page, run.stop * page)
                keys[:, span], values[:, span] = run.keys, run.values
            return
    with group.staging(pages.shape[1]) as columns:
        for start in range(0, pages.shape[1], columns):
            part = pages[:, start : start + columns]
            span = slice(start * page, (start + part.shape[1]) * page)
            read_keys, read_values = store.read(part.ravel())
            keys[:, span] = read_keys.reshape(group.heads, -1, group.layer.key_dim)
            values[:, span] = read_values.reshape(group.heads, -1, group.layer.value_dim)
