"""What a cache was fed: ids, padding and positions of every column, to check masks by and to prefill again from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.errors import MaskError
from kvtier.integrations.hf.columns import Columns

__all__ = ["History"]

_FIRST_CAPACITY = 256
_NEVER = 2**62


class History:
    """Columns of B rows, on the CPU: about 17 bytes a token, in buffers that double.

    The buffers are made outside inference mode, so that turns may run inside and outside of it.

    Not safe to share between threads; the cache that owns it is not either.
    """

    def __init__(self) -> None:
        self.length = 0
        self._ids = torch.zeros(0, 0, dtype=torch.int64)
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._real = torch.zeros(0, 0, dtype=torch.bool)
        self._last = torch.zeros(0, dtype=torch.int64)
        self._ids_known = True
        self._padded = False

    @property
    def rows(self) -> int:
        """Rows B; 0 before the first columns."""
        return self._ids.shape[0]

    @property
    def ids(self) -> torch.Tensor | None:
        """Token ids [B, T] int64; None when some columns came as embeddings."""
        return self._ids[:, : self.length] if self._ids_known else None

    @property
    def positions(self) -> torch.Tensor:
        """Positions [B, T] int64."""
        return self._positions[:, : self.length]

    @property
    def last_positions(self) -> torch.Tensor:
        """The highest position [B] of the tokens of each row, -1 where there is none."""
        return self._last

    @property
    def real(self) -> torch.Tensor:
        """Tokens, not padding [B, T] bool."""
        return self._real[:, : self.length]

    def check(self, mask: torch.Tensor | None, columns: Columns) -> None:
        """Refuse new columns that contradict the old ones.

        Raises
        ------
        MaskError
            When ``mask`` [B, T + Tq] masks the past otherwise than it was fed, or positions step back.
        """
        if self.length == 0:
            return
        if mask is None:
            agrees = not self._padded
        else:
            agrees = torch.equal(mask[:, : self.length].to(device="cpu", dtype=torch.bool), self.real)
        if not agrees:
            raise MaskError(
                f"the attention mask must repeat, for the {self.length} columns in the cache, the padding they were "
                "fed with; pass the mask of all columns, the old ones unchanged"
            )
        self._check_forward(columns)

    @torch.inference_mode(False)
    def extend(self, columns: Columns, ids: torch.Tensor | None) -> None:
        """Add columns; ``ids`` [B, Tq] None when they came as embeddings."""
        batch, width = columns.positions.shape
        self._reserve(batch, self.length + width)
        new = slice(self.length, self.length + width)
        self._positions[:, new] = columns.positions
        self._real[:, new] = True if columns.real is None else columns.real
        self._last = torch.maximum(self._last, _last_positions(columns.positions, columns.real))
        self._padded = self._padded or columns.real is not None
        if ids is None:
            self._ids_known = False
        else:
            self._ids[:, new] = ids
        self.length += width

    @torch.inference_mode(False)
    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` columns."""
        if remove:
            self.length -= remove
            self._last = _last_positions(self.positions, self.real)
            self._padded = not bool(self.real.all())

    @torch.inference_mode(False)
    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        index = torch.tensor(rows, dtype=torch.long)
        self._ids, self._positions, self._real = self._ids[index], self._positions[index], self._real[index]
        self._last = self._last[index]
        self._padded = self._padded and not bool(self.real.all())

    @torch.inference_mode(False)
    def copy(self) -> History:
        """A second history that grows apart."""
        twin = History()
        twin.length, twin._ids_known, twin._padded = self.length, self._ids_known, self._padded
        twin._ids, twin._positions, twin._real = self._ids.clone(), self._positions.clone(), self._real.clone()
        twin._last = self._last.clone()
        return twin

    def _check_forward(self, columns: Columns) -> None:
        new = columns.positions
        first = (new if columns.real is None else new.masked_fill(~columns.real, _NEVER)).amin(dim=1)
        back = first <= self._last
        if bool(back.any()):
            row = int(back.to(torch.int8).argmax())
            raise MaskError(
                f"positions must increase along a row: row {row} of the cache ends at position {int(self._last[row])} "
                f"and its new tokens start at {int(first[row])}; pass position_ids that go on, or leave them out"
            )

    def _reserve(self, batch: int, columns: int) -> None:
        if self.rows == 0:
            self._ids, self._positions, self._real = (
                torch.zeros(batch, _FIRST_CAPACITY, dtype=buffer.dtype)
                for buffer in (self._ids, self._positions, self._real)
            )
            self._last = torch.full((batch,), -1, dtype=torch.int64)
        short = columns - self._ids.shape[1]
        if short > 0:
            grow = max(short, self._ids.shape[1])
            self._ids, self._positions, self._real = (
                torch.nn.functional.pad(buffer, (0, grow)) for buffer in (self._ids, self._positions, self._real)
            )


def _last_positions(positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The highest position [B] of the tokens of each row, -1 where there is none."""
    if real is not None:
        positions = positions.masked_fill(~real, -1)
    if positions.shape[1] == 0:
        return torch.full(positions.shape[:1], -1, dtype=torch.int64)
    return positions.amax(dim=1)
