"""One sequence in one sliding-window layer: the last W - 1 tokens and what a crop may need, always on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.core.ledger import Ledger
from kvtier.core.policy import IntArray
from kvtier.core.sequence import Segment
from kvtier.errors import SessionStateError
from kvtier.types import LayerLayout

__all__ = ["WindowSequence"]

_PURPOSE = "windows"
_SLACK = 64


@dataclass(slots=True)
class WindowSequence:
    """Tokens of one sequence in one sliding-window layer.

    A buffer of W - 1 tokens, a chunk and some slack; the window slides along it and moves back to its start when the
    slack is used up.

    Parameters
    ----------
    chunk : int
        Tokens of a chunk: those of the chunk that is not full yet stay in the buffer behind the window, to be read; 0
        keeps none.

    Attributes
    ----------
    behind : int
        Tokens that the buffer still holds before the window; attention does not see them.
    recording : bool
        Keep everything until the next ``crop``, so that it can go back past the window.
    seen : int
        Tokens ever appended and not cropped.
    """

    layer: LayerLayout
    window: int
    device: torch.device
    ledger: Ledger
    keys: torch.Tensor
    values: torch.Tensor
    positions: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    start: int = 0
    seen: int = 0
    recording: bool = False
    version: object = field(default_factory=object)
    chunk: int = 0
    behind: int = 0

    @classmethod
    def empty(
        cls, layer: LayerLayout, window: int, device: torch.device, ledger: Ledger, *, chunk: int = 0
    ) -> WindowSequence:
        """A sequence without tokens; its buffer is allocated and counted."""
        keys, values = _buffers(layer, window - 1 + _SLACK + chunk, device, ledger)
        return cls(layer=layer, window=window, device=device, ledger=ledger, keys=keys, values=values, chunk=chunk)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.positions.size

    @property
    def croppable(self) -> int:
        """Tokens that a crop may take: all, or those beyond a whole window."""
        return self.seen if self.length == self.seen else max(0, self.length - self.window + 1)

    @property
    def last_position(self) -> int | None:
        """Position of the newest token held; None when there is none."""
        return int(self.positions[-1]) if self.length else None

    @property
    def _least(self) -> int:
        """Tokens that the buffer has room for at least."""
        return self.window - 1 + _SLACK + self.chunk

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Add tokens K [Hk, n, Dk], V [Hk, n, Dv], or the same as a batch of one, at ascending ``positions`` [1, n]."""
        fresh = positions[0]
        if not self.recording:
            self._keep_last(self.window - 1)
        end = self.start + self.length
        if end + fresh.size > self.keys.shape[1]:
            self._move(max(self.behind + self.length + fresh.size, self._least))
            end = self.start + self.length
        self.keys[:, end : end + fresh.size] = keys
        self.values[:, end : end + fresh.size] = values
        self.positions = np.concatenate([self.positions, fresh])
        self.seen += fresh.size
        self.version = object()

    def segments(self) -> Iterator[Segment]:
        """All tokens held, as one view."""
        if self.length:
            span = slice(self.start, self.start + self.length)
            yield Segment(0, self.length, self.keys[None, :, span], self.values[None, :, span])

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views of tokens ``start`` to ``stop``, counted from the first ever appended; None when some slid out."""
        first = self.seen - self.length - self.behind
        if not first <= start <= stop <= self.seen:
            return None
        origin = self.start - self.behind - first
        span = slice(origin + start, origin + stop)
        return self.keys[:, span], self.values[:, span]

    def pass_over(self, tokens: int) -> None:
        """Count tokens that were appended in another run and slid out of the window; the sequence must be empty."""
        if self.length:
            raise SessionStateError(f"{self.length} tokens are held; only an empty window can pass over tokens")
        self.seen += tokens
        self.behind, self.start = 0, 0
        self.version = object()

    def put_back(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray, *, seen: int, start: int) -> None:
        """Hold tokens K [Hk, n, Dk], V [Hk, n, Dv] of a saved window, the last of them at ``positions``; must be empty.

        Those before them are kept if the chunk that is not full yet has them. The window begins at ``start`` of the
        buffer, if there is room.
        """
        held = keys.shape[1]
        if held > self.keys.shape[1]:
            self._move(held)
        behind = held - positions.size
        self.start = start if start + positions.size <= self.keys.shape[1] else behind
        span = slice(self.start - behind, self.start + positions.size)
        self.keys[:, span], self.values[:, span] = keys, values
        self.positions, self.seen, self.behind = positions, seen, behind
        self._keep_last(positions.size)
        self.version = object()

    def settle(self) -> None:
        """Shrink an outgrown buffer back; called when the step that needed it is over."""
        if not self.recording:
            self._shrink()

    def fork(self) -> WindowSequence:
        """A second sequence with the same tokens, copied."""
        keys, values = _buffers(self.layer, self.keys.shape[1], self.device, self.ledger)
        span = slice(self.start - self.behind, self.start + self.length)
        keys[:, span], values[:, span] = self.keys[:, span], self.values[:, span]
        return WindowSequence(
            layer=self.layer,
            window=self.window,
            device=self.device,
            ledger=self.ledger,
            keys=keys,
            values=values,
            positions=self.positions,
            start=self.start,
            seen=self.seen,
            recording=self.recording,
            version=self.version,
            chunk=self.chunk,
            behind=self.behind,
        )

    def check_crop(self, remove: int) -> None:
        """Raise ``SessionStateError`` when ``crop`` would need tokens that slid out; ``record_past`` keeps them."""
        if remove > self.croppable:
            raise SessionStateError(
                f"cannot remove {remove} tokens from a sliding window of {self.window}: the {self.window - 1} "
                f"before them are kept for the last {self.croppable} only; call record_past(True) before the appends"
            )

    def crop(self, remove: int) -> None:
        """Forget the newest ``remove`` tokens, and all recorded past the window."""
        if remove:
            self.positions = self.positions[: self.length - remove]
            self.seen -= remove
            self.version = object()
        self._shrink()

    def release(self) -> None:
        """Give the buffer back; the sequence must not be used again."""
        self.ledger.give(_PURPOSE, self.keys.shape[1] * self.layer.token_bytes)
        self.keys, self.values, self.positions = self.keys[:, :0], self.values[:, :0], self.positions[:0]

    def _shrink(self) -> None:
        self._keep_last(self.window - 1)
        if self.keys.shape[1] > self._least:
            self._move(self._least)

    def _keep_last(self, tokens: int) -> None:
        excess = self.length - tokens
        if excess > 0:
            self.start += excess
            self.positions = self.positions[excess:]
            self.behind += excess
        if self.behind:
            unfinished = self.seen % self.chunk if self.chunk else 0
            self.behind = min(self.behind, max(0, unfinished - self.length))

    def _move(self, capacity: int) -> None:
        """To a buffer of ``capacity`` tokens, or to the start of this one."""
        span = slice(self.start - self.behind, self.start + self.length)
        held_keys, held_values = self.keys[:, span], self.values[:, span]
        if capacity == self.keys.shape[1]:
            held_keys, held_values = held_keys.clone(), held_values.clone()
        else:
            old = self.keys.shape[1]
            self.keys, self.values = _buffers(self.layer, capacity, self.device, self.ledger)
            self.ledger.give(_PURPOSE, old * self.layer.token_bytes)
        held = self.behind + self.length
        self.keys[:, :held], self.values[:, :held] = held_keys, held_values
        self.start = self.behind


def _buffers(
    layer: LayerLayout, tokens: int, device: torch.device, ledger: Ledger
) -> tuple[torch.Tensor, torch.Tensor]:
    ledger.take(_PURPOSE, tokens * layer.token_bytes)
    dtype: torch.dtype = getattr(torch, layer.dtype)
    shape = (layer.num_kv_heads, tokens)
    keys = torch.empty(*shape, layer.key_dim, dtype=dtype, device=device)
    return keys, torch.empty(*shape, layer.value_dim, dtype=dtype, device=device)
