"""A record's payload into keys and values: rows of pages, K then V of each, head by head as they prove right."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.split_rows import blocked, reference
from kvtier.kernels.split_rows.blocked import CopyHeads

__all__ = ["CopyHeads", "plan_split"]


class SplitRows(Protocol):
    """What an implementation of this operator provides, on one device."""

    def plan(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_tokens: int, /) -> CopyHeads:
        """How to copy heads of rows [bytes] to keys [L, Hk, C, Dk] and values [L, Hk, C, Dv]."""


def _native() -> SplitRows:
    from kvtier.kernels.split_rows import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.split_rows import native

    return native.obstacle(device)


OPERATOR: Final = Operator[SplitRows](
    "split_rows",
    [
        Candidate("native", _native, "page by page, past the caches", _native_obstacle),
        Candidate("blocked", lambda: blocked, "strided copies"),
        Candidate("reference", lambda: reference, "page by page"),
    ],
)


def plan_split(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, page_tokens: int) -> CopyHeads:
    """How to copy rows into keys and values; nothing is copied yet.

    The plan is called with heads, counted through the layers: ``copy(first, stop)`` copies those. So a reader can
    have rows copied and verify them while they are in the cache; until all are verified, nothing of keys and values may
    be used. A plan keeps its tensors; any number of threads may have plans of their own.

    Parameters
    ----------
    rows : Tensor
        uint8, contiguous: rows [L, Hk, N] of a page each, its K [P, Dk] and then its V [P, Dv].
    keys, values : Tensor
        [L, Hk, N * P, Dk] and [L, Hk, N * P, Dv] of one type, on any device, of any strides.
    page_tokens : int
        P.

    Raises
    ------
    InputError
        Shapes, types or sizes that do not fit together.
    """
    shape, others = keys.shape, values.shape
    if (
        len(shape) != 4
        or len(others) != 4
        or shape[0] != others[0]
        or shape[1] != others[1]
        or shape[2] != others[2]
        or shape[2] % page_tokens
        or keys.dtype != values.dtype
        or keys.device != values.device
        or rows.dtype != torch.uint8
        or not rows.is_contiguous()
        or rows.numel() != keys.nbytes + values.nbytes
    ):
        raise InputError(
            f"keys [L, Hk, C, Dk] and values [L, Hk, C, Dv] of one type and device, C a multiple of {page_tokens}, "
            f"need as many contiguous bytes of rows, got {list(keys.shape)} {keys.dtype}, {list(values.shape)} "
            f"{values.dtype} and {list(rows.shape)} {rows.dtype}"
        )
    return OPERATOR.on(keys.device).plan(rows, keys, values, page_tokens)
