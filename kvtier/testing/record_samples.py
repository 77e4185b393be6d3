"""Records for tests that say what they are: bytes that follow from a number, a generation and a size."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from kvtier.storage_backends.records import ByteRange, ReadRequest, Record, RecordStore

__all__ = [
    "NAMESPACE",
    "OpenStore",
    "fetch",
    "generation_of",
    "physical_bytes",
    "sample_bytes",
    "sample_key",
    "sample_record",
]

OpenStore: TypeAlias = Callable[[Path, int], RecordStore]
"""Opens the store of a directory, with a hard bound of bytes; a store without files ignores the directory."""

NAMESPACE = hashlib.blake2b(b"kvtier.testing", digest_size=32).digest()

_LABEL = struct.Struct("<QQ")


def sample_key(number: int) -> bytes:
    """The key of a numbered record."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def sample_bytes(number: int, generation: int, size: int) -> bytes:
    """Payload of a numbered record: what was put as its nth ``generation``; it begins with both, where it has room."""
    noise = np.random.default_rng([number, generation]).bytes(size)
    return (_LABEL.pack(number, generation) + noise[_LABEL.size :])[:size]


def generation_of(number: int, payload: bytes) -> int | None:
    """Which generation of a numbered record these are all the bytes of; None when they are anything else.

    Needs a payload of at least 16 bytes.
    """
    named, generation = _LABEL.unpack_from(payload)
    right = named == number and payload == sample_bytes(number, generation, len(payload))
    return int(generation) if right else None


def sample_record(
    number: int,
    size: int,
    *,
    generation: int = 0,
    tenant: str = "default",
    meta: bytes = b"",
    cuts: Sequence[int] = (),
) -> Record:
    """A numbered record of ``size`` bytes, its payload in several buffers cut at ``cuts``."""
    payload = torch.frombuffer(bytearray(sample_bytes(number, generation, size)), dtype=torch.uint8) if size else _EMPTY
    edges = [0, *sorted(cuts), size]
    buffers = [payload[start:end].clone() for start, end in itertools.pairwise(edges)]
    return Record(key=sample_key(number), namespace=NAMESPACE, buffers=buffers, tenant=tenant, meta=meta)


def fetch(store: RecordStore, number: int, size: int, ranges: Sequence[ByteRange] | None = None) -> bytes | None:
    """Bytes of a numbered record as the store serves them; None for a miss."""
    wanted = size if ranges is None else sum(length for _, length in ranges)
    into = torch.full((wanted,), 0xA5, dtype=torch.uint8)
    (served,) = store.read([ReadRequest(sample_key(number), into, None if ranges is None else tuple(ranges))])
    return into.numpy().tobytes() if served else None


def physical_bytes(directory: Path) -> int:
    """Bytes that the file system holds for the files below a directory.

    What vanishes meanwhile counts nothing; a file that is renamed meanwhile counts once.
    """
    held: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                stat = Path(folder, name).lstat()
            except FileNotFoundError:
                continue
            held[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(held.values())


_EMPTY = torch.empty(0, dtype=torch.uint8)
