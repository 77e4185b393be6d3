"""kvtier's segment store: every read verified, records laid out next to each other, one sync a durable put."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kvtier.storage_backends.records import PutState, ReadRequest, Record
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords

_NAMESPACE: Final = sha256(b"benchmark").digest()
_LEAST_CAPACITY: Final = 2 << 30


class Store:
    """`SegmentRecords` as it comes; its direct I/O cannot be switched off but by the file system."""

    def __init__(self, directory: Path, *, piece_bytes: int, pieces: int, direct: bool, durable: bool) -> None:
        capacity = max(_LEAST_CAPACITY, 4 * pieces * (piece_bytes + 4096))
        options = SegmentOptions(capacity=capacity, durability="durable" if durable else "relaxed")
        self._records = SegmentRecords(directory, options)
        # Room for data is taken before the timing, as fio, NIXL and raw_block take it: here, the first segment.
        first = self.batch(["first"], [np.zeros(4096, np.uint8)])
        if not self.get(first)[0]:
            self.put(first)
        found = self._records.capabilities()
        self.note = "verified" + ("" if found.direct_io == direct else f"; direct I/O {found.direct_io}")

    def batch(self, names: Sequence[str], buffers: Sequence[Any]) -> Any:
        """Keys and tensors; the records and requests are made inside of the timing."""
        return [
            (sha256(name.encode()).digest(), torch.from_numpy(buffer))
            for name, buffer in zip(names, buffers, strict=True)
        ]

    def put(self, batch: Any) -> None:
        """One put."""
        outcomes = self._records.put(
            [Record(key=key, namespace=_NAMESPACE, buffers=(buffer,)) for key, buffer in batch]
        )
        for outcome in outcomes:
            if outcome.state is not PutState.STORED:
                raise RuntimeError(f"{outcome.state.value}: {outcome.reason}")

    def get(self, batch: Any) -> list[bool]:
        """One read."""
        return self._records.read([ReadRequest(key, buffer) for key, buffer in batch])

    def close(self) -> None:
        """Flush and close."""
        self._records.close()
