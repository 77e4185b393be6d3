"""Small summaries by which sealed pages are ranked: bounds (Quest), means (ShadowKV) and bit planes."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.page_summaries import blocked, reference
from kvtier.kernels.tiles import triton_obstacle

__all__ = ["page_bounds", "page_landmarks", "page_planes"]

_MOST_BITS: Final = 8


class PageSummaries(Protocol):
    """What an implementation of this operator provides: the public functions with checked arguments."""

    def page_bounds(self, k: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds over the slots."""

    def page_landmarks(self, k: torch.Tensor, /) -> torch.Tensor:
        """Means over the slots."""

    def page_planes(self, k: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, bits: int, /) -> torch.Tensor:
        """Bits of the codes of every slot."""


def _triton() -> PageSummaries:
    from kvtier.kernels.page_summaries import triton

    return triton


def _native() -> PageSummaries:
    from kvtier.kernels.page_summaries import native

    return native


def _native_obstacle(device: torch.device) -> str | None:
    from kvtier.kernels.page_summaries import native

    return native.obstacle(device)


OPERATOR: Final = Operator[PageSummaries](
    "page_summaries",
    [
        Candidate("triton", _triton, "pages are read once", triton_obstacle),
        Candidate("native", _native, "keys are read once, as fast as memory gives them", _native_obstacle),
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "slot by slot"),
    ],
)


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of each channel over the slots of a page.

    Parameters
    ----------
    k : Tensor
        [..., P, D] with at least one slot.

    Returns
    -------
    tuple of Tensor
        kmin and kmax, each [..., D] of the type of k: exact, no rounding.

    Raises
    ------
    InputError
        When k has no slots or fewer than two dimensions.
    """
    _check(k, "page_bounds")
    return OPERATOR.on(k.device).page_bounds(k)


def page_landmarks(k: torch.Tensor) -> torch.Tensor:
    """Mean key of a page: its landmark (ShadowKV, Sun et al. 2024, section 4.1).

    Parameters
    ----------
    k : Tensor
        [..., P, D] with at least one slot.

    Returns
    -------
    Tensor
        [..., D] of the type of k: added up in fp32 (fp64 for fp64) and rounded once.

    Raises
    ------
    InputError
        When k has no slots or fewer than two dimensions.
    """
    _check(k, "page_landmarks")
    return OPERATOR.on(k.device).page_landmarks(k)


def page_planes(k: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Bit planes of the keys of a page between its bounds, the most significant first.

    Of each channel the range [kmin, kmax] is cut into ``2**bits`` equal cells, and a key's code is the number of its
    cell. The first b planes are the codes of ``2**b`` cells, so a reader may stop after any plane.

    Parameters
    ----------
    k : Tensor
        [..., P, D] with at least one slot.
    kmin, kmax : Tensor
        [..., D], as :func:`page_bounds` gives them.
    bits : int
        Planes, 1 to 8.

    Returns
    -------
    Tensor
        [..., bits, P, ceil(D / 8)] uint8: bit ``7 - d % 8`` of byte ``d // 8`` is that of channel d; spare bits are 0.

    Raises
    ------
    InputError
        When shapes do not fit together or ``bits`` is out of range.
    """
    _check(k, "page_planes")
    if not kmin.shape == kmax.shape == k.shape[:-2] + k.shape[-1:]:
        raise InputError(
            "page_planes needs keys [..., P, D] with bounds kmin and kmax [..., D], "
            f"got {list(k.shape)}, {list(kmin.shape)}, {list(kmax.shape)}"
        )
    if not 1 <= bits <= _MOST_BITS:
        raise InputError(f"page_planes needs bits from 1 to {_MOST_BITS}, got {bits}")
    return OPERATOR.on(k.device).page_planes(k, kmin, kmax, bits)


def _check(k: torch.Tensor, name: str) -> None:
    if k.dim() < 2 or not k.shape[-2]:
        raise InputError(f"{name} needs keys [..., P, D] with at least one slot, got {list(k.shape)}")
