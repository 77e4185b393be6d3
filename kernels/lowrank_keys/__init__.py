"""Keys rebuilt from low-rank factors and rotated to their positions (ShadowKV, Sun et al. 2024, section 4.2)."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.lowrank_keys import blocked, reference
from kvtier.kernels.lowrank_keys.rotation import Rotation, rotary_tables
from kvtier.kernels.tiles import triton_obstacle

__all__ = ["Rotation", "lowrank_keys", "rotary_tables"]


class LowRankKeys(Protocol):
    """What an implementation of this operator provides: the public function with checked arguments."""

    def lowrank_keys(
        self,
        u: torch.Tensor,
        sv: torch.Tensor,
        positions: torch.Tensor,
        pages: torch.Tensor,
        rotation: Rotation,
        /,
        *,
        page_tokens: int,
    ) -> torch.Tensor:
        """Keys of pages."""


def _triton() -> LowRankKeys:
    from kvtier.kernels.lowrank_keys import triton

    return triton


OPERATOR: Final = Operator[LowRankKeys](
    "lowrank_keys",
    [
        Candidate("triton", _triton, "keys exist only rotated", triton_obstacle),
        Candidate("blocked", lambda: blocked, "fastest in plain torch"),
        Candidate("reference", lambda: reference, "dense, in one piece"),
    ],
)


def lowrank_keys(
    u: torch.Tensor,
    sv: torch.Tensor,
    positions: torch.Tensor,
    pages: torch.Tensor,
    rotation: Rotation,
    *,
    page_tokens: int = 1,
) -> torch.Tensor:
    """Keys of the named pages: the rows of ``u`` times ``sv``, rotated to the positions of their tokens.

    Sums are added up in fp32 whatever the 16-bit type of the factors, in fp64 when one of them is fp64, and rounded
    once. Rows, positions and rotations of tokens that are not named are never read. Not differentiable: call it under
    ``torch.no_grad()``. Any number of threads may call it at the same time.

    Parameters
    ----------
    u : Tensor
        [B, T, r]: of every token its coefficients, the same for all KV heads.
    sv : Tensor
        [B, Hk, r, D]: what the coefficients multiply, so that ``u @ sv`` are the keys before rotation.
    positions : Tensor
        [B, T] int64: the position at which each token was rotated, a row of the tables.
    pages : Tensor
        [B, Hk, N] int64: page n holds the tokens ``page_tokens * n`` and following. Each KV head names its own.
    rotation : Rotation
        Tables of [S, R / 2] for the first R channels, R even and at most D.
    page_tokens : int
        Tokens P of a page; at 1 pages are tokens.

    Returns
    -------
    Tensor
        [B, Hk, N * P, D] of the type of u, pages end to end.

    Raises
    ------
    InputError
        When shapes do not fit together.
    """
    _check(u, sv, positions, pages, rotation, page_tokens)
    return OPERATOR.on(u.device).lowrank_keys(u, sv, positions, pages, rotation, page_tokens=page_tokens)


def _check(
    u: torch.Tensor,
    sv: torch.Tensor,
    positions: torch.Tensor,
    pages: torch.Tensor,
    rotation: Rotation,
    page_tokens: int,
) -> None:
    cos, sin = rotation
    if not (
        u.dim() == pages.dim() == 3
        and sv.dim() == 4
        and u.shape[0] == sv.shape[0] == pages.shape[0]
        and u.shape[2] == sv.shape[2]
        and pages.shape[1] == sv.shape[1]
        and positions.shape == u.shape[:2]
        and cos.dim() == 2
        and cos.shape == sin.shape
        and 2 * cos.shape[1] <= sv.shape[3]
        and sv.shape[3] % 2 == 0
        and page_tokens >= 1
        and pages.dtype == positions.dtype == torch.int64
    ):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (u, sv, positions, pages, cos, sin))
        raise InputError(
            "lowrank_keys needs u [B, T, r], sv [B, Hk, r, D] with D even, positions [B, T] and pages [B, Hk, N] of "
            f"int64, tables [S, R / 2] with R at most D, and page_tokens of at least 1, got {shapes}, "
            f"{positions.dtype}, {pages.dtype} and {page_tokens}"
        )
