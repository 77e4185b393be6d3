"""The columns of one forward: which of them are tokens, and at which positions they stand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvtier.errors import MaskError

__all__ = ["Columns", "read_columns", "real_spans"]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What a forward of width Tq adds to every row.

    Parameters
    ----------
    positions : Tensor
        [B, Tq] int64 on the CPU; those of padding mean nothing.
    real : Tensor, optional
        [B, Tq] bool on the CPU: tokens, not padding. None when all are.
    spans : tuple of slice, optional
        The tokens of each row as one run; None when all columns are tokens.
    """

    positions: torch.Tensor
    real: torch.Tensor | None = None
    spans: tuple[slice, ...] | None = None
    _copies: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def positions_on(self, device: torch.device) -> torch.Tensor:
        """``positions`` on a device, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.positions.to(device)
        return self._copies[device]


def read_columns(
    mask: torch.Tensor | None, position_ids: torch.Tensor | None, *, batch: int, start: int, width: int
) -> Columns:
    """Read a forward's padding mask and positions.

    Parameters
    ----------
    mask : Tensor, optional
        [B, start + Tq] bool, True for tokens.
    position_ids : Tensor, optional
        [B or 1, Tq]; without them columns are positions.
    start : int
        Columns before this forward.

    Raises
    ------
    MaskError
        For a mask of another shape, tokens of a row that are not one run, or positions that do not increase.
    """
    real = spans = None
    if mask is not None:
        _check_shape(mask, batch, start + width)
        real = mask[:, start:].to(device="cpu", dtype=torch.bool)
        spans = None if bool(real.all()) else real_spans(real)
        real = None if spans is None else real
    positions = _positions(position_ids, batch, start, width)
    _check_increasing(positions, real)
    return Columns(positions, real, spans)


def real_spans(real: torch.Tensor) -> tuple[slice, ...]:
    """The tokens of each row of ``real`` [B, T] as one run, empty for a row of padding.

    Raises
    ------
    MaskError
        When padding stands between tokens.
    """
    count = real.sum(dim=1)
    first = real.to(torch.int8).argmax(dim=1)
    last = real.shape[1] - 1 - real.flip(1).to(torch.int8).argmax(dim=1)
    holed = (count > 0) & (last - first + 1 != count)
    if bool(holed.any()):
        row = int(holed.to(torch.int8).argmax())
        raise MaskError(
            f"the tokens of a row must be one run, padded left or right, but the mask of row {row} has a hole between "
            f"columns {int(first[row])} and {int(last[row])}; remove the masked tokens from the input"
        )
    return tuple(slice(a, a + n) for a, n in zip(first.tolist(), count.tolist(), strict=True))


def _check_shape(mask: torch.Tensor, batch: int, columns: int) -> None:
    if tuple(mask.shape) != (batch, columns):
        raise MaskError(
            f"the attention mask must be [{batch}, {columns}] (rows, columns in the cache and new), 1 for tokens and 0 "
            f"for padding, got {list(mask.shape)}; pass the padding mask of all columns"
        )


def _positions(position_ids: torch.Tensor | None, batch: int, start: int, width: int) -> torch.Tensor:
    """Positions [B, Tq] int64 on the CPU."""
    if position_ids is None:
        return torch.arange(start, start + width).expand(batch, width)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != width:
        raise MaskError(
            f"position_ids must be [{batch} or 1, {width}] (rows, new columns), got {list(position_ids.shape)}"
        )
    return position_ids.to(device="cpu", dtype=torch.int64).expand(batch, width)


def _check_increasing(positions: torch.Tensor, real: torch.Tensor | None) -> None:
    stuck = positions[:, 1:] <= positions[:, :-1]
    if real is not None:
        stuck = stuck & real[:, 1:] & real[:, :-1]
    if bool(stuck.any()):
        row = int(stuck.any(dim=1).to(torch.int8).argmax())
        raise MaskError(
            f"positions must increase along a row, and those of row {row} do not; "
            "sequences packed into one row are not served: give each a row of its own"
        )
