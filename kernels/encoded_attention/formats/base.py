"""Encoded blocks: how the codes of K or V, their scales and minima lie in bytes, whatever the format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch

from kvtier.errors import ConfigError, InputError

__all__ = ["ALIGNMENT", "BlockFormat", "CodeKind"]

CodeKind = Literal["unsigned", "signed", "e4m3", "planes"]

ALIGNMENT: Final = 16
"""Bytes that parts of a block are a multiple of, and tokens that a block is: what a GPU loads, what it multiplies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat(ABC):
    """How K or V of one block of one KV head lies in bytes.

    A block is ``slots`` tokens of ``dim`` channels, in this order, each part zero-filled to a multiple of 16 bytes:

    - scales and then minima, where there are any, [slots / token_group, dim / channel_group] each, of ``scale_dtype``;
    - codes, uint8 [stored_planes, slots, columns], columns = dim * bits / 8. Byte j of a token holds the codes of
      channels j, j + columns, j + 2 * columns, ...; the first in its lowest bits. So a byte comes apart into channels
      that lie side by side, and a kernel needs to shuffle nothing.

    An element is ``scale * code + minimum``, in the precision that is asked for. Formats are values: equal ones lay
    bytes alike.

    Parameters
    ----------
    slots : int
        Tokens of a block, a power of two from 16 on.
    dim : int
        Channels.

    Raises
    ------
    ConfigError
        When a size does not fit.
    """

    name: ClassVar[str]
    code: ClassVar[CodeKind]
    scale_dtype: ClassVar[torch.dtype] = torch.float32
    has_minima: ClassVar[bool] = False

    slots: int
    dim: int

    def __post_init__(self) -> None:
        if self.slots < ALIGNMENT or self.slots & (self.slots - 1):
            raise ConfigError(f"{self.name}: slots must be a power of two from {ALIGNMENT} on, got {self.slots}")
        if self.dim < 1 or self.dim * self.bits % 8:
            raise ConfigError(f"{self.name}: dim must fill whole bytes of {self.bits}-bit codes, got {self.dim}")
        if self.token_group < 1 or self.slots % self.token_group:
            raise ConfigError(f"{self.name}: group must divide the {self.slots} slots, got {self.token_group}")
        if self.channel_group < 1 or self.dim % self.channel_group:
            raise ConfigError(f"{self.name}: group must divide the {self.dim} channels, got {self.channel_group}")

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code within its byte: 8 / bits channels share one."""

    @property
    @abstractmethod
    def token_group(self) -> int:
        """Consecutive tokens that share a scale."""

    @property
    @abstractmethod
    def channel_group(self) -> int:
        """Consecutive channels that share a scale."""

    @property
    def stored_planes(self) -> int:
        """Arrays of codes that a block holds."""
        return 1

    @property
    def columns(self) -> int:
        """Bytes of the codes of one token, in one plane."""
        return self.dim * self.bits // 8

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of tokens and groups of channels."""
        return self.slots // self.token_group, self.dim // self.channel_group

    @property
    def codes_at(self) -> int:
        """Where the codes begin, in bytes."""
        count = self.groups[0] * self.groups[1] * (2 if self.has_minima else 1)
        return _aligned(count * self.scale_dtype.itemsize)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return _aligned(self.codes_at + self.stored_planes * self.slots * self.columns)

    @property
    def read_bytes(self) -> int:
        """Bytes of a block that attention reads, all of them at its beginning."""
        return self.block_bytes

    def encode(self, block: torch.Tensor) -> torch.Tensor:
        """Bytes uint8 [..., block_bytes] of finite K or V [..., slots, dim], computed in fp32; on any device.

        Raises
        ------
        InputError
            For another shape.
        """
        if block.shape[-2:] != (self.slots, self.dim):
            raise InputError(f"{self.name}: a block must be [..., {self.slots}, {self.dim}], got {list(block.shape)}")
        grouped = self._grouped(block.float())
        scale, minimum = self._fit(grouped)
        units = self._units(grouped, scale, minimum).reshape(block.shape)
        stored = [scale] if minimum is None else [scale, minimum]
        bytes_of = [part.to(self.scale_dtype).flatten(-4).contiguous().view(torch.uint8) for part in stored]
        written = torch.zeros(*block.shape[:-2], self.block_bytes, dtype=torch.uint8, device=block.device)
        at = 0
        for part in bytes_of:
            written[..., at : at + part.shape[-1]] = part
            at += part.shape[-1]
        codes = self._packed(units).flatten(block.dim() - 2)
        written[..., self.codes_at : self.codes_at + codes.shape[-1]] = codes
        return written

    def decode(
        self, blocks: torch.Tensor, *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """K or V [..., slots, dim] of blocks uint8 [..., block_bytes], computed in ``dtype``, fp32 or fp64.

        Parameters
        ----------
        out : Tensor, optional
            Contiguous [..., slots, dim] of ``dtype``, filled and returned.

        Raises
        ------
        InputError
            For other bytes.
        """
        if blocks.dtype != torch.uint8 or blocks.shape[-1] != self.block_bytes:
            raise InputError(
                f"{self.name}: blocks must be uint8 [..., {self.block_bytes}], got {blocks.dtype} {list(blocks.shape)}"
            )
        shape = (*blocks.shape[:-1], self.slots, self.dim)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=blocks.device)
        codes = blocks[..., self.codes_at : self.codes_at + self.stored_planes * self.slots * self.columns]
        self._unpack(codes.unflatten(-1, (self.stored_planes, self.slots, self.columns)), out)
        scale, minimum = self._stored(blocks, dtype)
        # Two operations: torch's fused one is slow where a group shares one number.
        grouped = self._grouped(out).mul_(scale)
        if minimum is not None:
            grouped.add_(minimum)
        return out

    @abstractmethod
    def _fit(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and minima [..., gt, 1, gc, 1] of elements [..., gt, token_group, gc, channel_group], as stored."""

    @abstractmethod
    def _units(self, grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        """Codes of the same elements, one an element."""

    @abstractmethod
    def _packed(self, units: torch.Tensor) -> torch.Tensor:
        """Codes [..., slots, dim] as bytes [..., stored_planes, slots, columns]."""

    @abstractmethod
    def _unpack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        """Codes [..., stored_planes, slots, columns] as numbers into ``out`` [..., slots, dim]."""

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        grouped: torch.Tensor = x.unflatten(-1, (-1, self.channel_group)).unflatten(-3, (-1, self.token_group))
        return grouped

    def _stored(self, blocks: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and minima [..., gt, 1, gc, 1] out of blocks."""
        rows, columns = self.groups
        count = rows * columns * self.scale_dtype.itemsize
        shape = (rows, 1, columns, 1)
        scale = blocks[..., :count].view(self.scale_dtype).to(dtype).unflatten(-1, shape)
        if not self.has_minima:
            return scale, None
        return scale, blocks[..., count : 2 * count].view(self.scale_dtype).to(dtype).unflatten(-1, shape)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
