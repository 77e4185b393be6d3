"""Keys and records by number."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

import torch

from kvtier.storage_backends.records import Record

__all__ = ["key_of", "records_of"]

_NAMESPACE: Final = sha256(b"benchmark").digest()


def key_of(number: int) -> bytes:
    """The key of a record [32]."""
    return sha256(number.to_bytes(8, "little")).digest()


def records_of(payloads: Sequence[torch.Tensor], first: int) -> list[Record]:
    """Records of these payloads, numbered from ``first`` on."""
    return [
        Record(key=key_of(first + index), namespace=_NAMESPACE, buffers=(payload,))
        for index, payload in enumerate(payloads)
    ]
