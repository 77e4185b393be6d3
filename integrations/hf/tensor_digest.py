"""Digests of tensors by their bytes, the same on every device, and cheap signs that a tensor has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
import xxhash

from kvtier.errors import UnsupportedModelError

__all__ = ["TensorState", "probe", "state_of", "tensor_digests"]

_PIECE: Final = 64 << 20
_BLOCK: Final = 64 << 10
_BLOCKS: Final = 16
_PROBED: Final = 16
_WORKERS: Final = 8


class TensorState(NamedTuple):
    """How a tensor looks from outside; two equal states mean that it very likely holds the same bytes."""

    address: int
    version: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    probed: bytes


def tensor_digests(tensors: Mapping[str, torch.Tensor], *, whole: bool) -> dict[str, bytes]:
    """A digest of shape, dtype and bytes of each tensor.

    Parameters
    ----------
    whole : bool
        Whether every byte is hashed; else blocks of each tensor and the sum of all its words.

    Raises
    ------
    UnsupportedModelError
        For a tensor without bytes in memory.
    """
    if not tensors:
        return {}
    workers = min(_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="kvtier-fingerprint") as pool:
        digests = pool.map(lambda item: _digest(*item, whole=whole), tensors.items())
        return dict(zip(tensors, digests, strict=True))


def probe(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes of 16 elements at even distances of each tensor; one transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    found: dict[str, bytes] = {}
    for (device, _), names in groups.items():
        if device.type == "meta":
            continue
        parts = [_spread(tensors[name].detach()) for name in names]
        row = _as_bytes(torch.cat(parts).cpu()).numpy().tobytes()
        end = 0
        for name, part in zip(names, parts, strict=True):
            start, end = end, end + part.numel() * part.element_size()
            found[name] = row[start:end]
    return {name: found.get(name, b"") for name in tensors}


def state_of(tensor: torch.Tensor, probed: bytes) -> TensorState:
    """How a tensor looks from outside."""
    # Tensors made in inference mode count no versions.
    version = -1 if tensor.is_inference() else tensor._version  # noqa: SLF001
    address = 0 if tensor.device.type == "meta" else tensor.data_ptr()
    return TensorState(address, version, tuple(tensor.shape), tensor.dtype, tensor.device, probed)


def _digest(name: str, tensor: torch.Tensor, *, whole: bool) -> bytes:
    if tensor.device.type == "meta":
        raise UnsupportedModelError(
            f"{name} has no bytes in memory (it is on the meta device), so the model cannot be told from others; "
            "load all weights to use stored prefixes"
        )
    digest = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype} {'whole' if whole else 'blocks'}".encode())
    try:
        data = _as_bytes(tensor.detach())
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(f"the bytes of {name} ({type(tensor).__name__}) cannot be read: {error}") from error
    for piece in _pieces(data) if whole else _blocks(data):
        digest.update(piece.cpu().numpy().data)
    if not whole:
        digest.update(_word_sum(data).to_bytes(8, "little", signed=True))
    return digest.digest()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes [n] uint8 of a tensor, without a copy where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _pieces(data: torch.Tensor) -> Iterator[torch.Tensor]:
    """All of it; in pieces, so that what lies on another device is not copied at once."""
    yield from data.split(_PIECE)


def _blocks(data: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks at even distances, the first and the last among them; all of what is short."""
    if data.numel() <= _BLOCK * _BLOCKS:
        yield data
        return
    last = data.numel() - _BLOCK
    for index in range(_BLOCKS):
        start = last * index // (_BLOCKS - 1)
        yield data[start : start + _BLOCK]


def _word_sum(data: torch.Tensor) -> int:
    """The sum modulo 2**64 of all 64-bit words, and of the bytes behind the last: exact, so it has no order."""
    words = data.numel() // 8 * 8
    aligned = data[:words]
    if aligned.data_ptr() % 8:
        aligned = aligned.clone()
    head = int(aligned.view(torch.int64).sum()) if words else 0
    rest = int.from_bytes(bytes(data[words:].cpu().tolist()), "little")
    return (head + rest + 2**63) % 2**64 - 2**63


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Up to 16 elements [n] at even distances."""
    if not tensor.numel():
        return tensor.reshape(-1)
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((1,), (1,))
    step = max(1, flat.numel() // _PROBED)
    return flat[::step][:_PROBED]
