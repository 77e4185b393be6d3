"""The record store: opaque, verified bytes under 32-byte keys, what the cache service stands on.

A record store may forget anything at any time and never serves a byte other than those that were put: whatever is
missing, damaged, torn, slow or foreign is a miss, counted and put aside. Nothing in here raises for what a medium does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvtier.errors import InputError
from kvtier.record import KEY_BYTES, MAX_META_BYTES, MAX_TENANT_BYTES

if TYPE_CHECKING:
    from types import TracebackType

    from kvtier.storage_backends.base import Capabilities

__all__ = [
    "KEY_BYTES",
    "MAX_META_BYTES",
    "MAX_TENANT_BYTES",
    "BoolArray",
    "ByteRange",
    "Lease",
    "PutOutcome",
    "PutState",
    "ReadRequest",
    "Record",
    "RecordInfo",
    "RecordStats",
    "RecordStore",
    "RecordView",
]

BoolArray: TypeAlias = npt.NDArray[np.bool_]


class ByteRange(NamedTuple):
    """``length`` bytes of a payload from ``offset`` on."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is put: a key and the bytes under it, which never change.

    Parameters
    ----------
    key, namespace : bytes
        32 bytes each. The namespace is stored to be reported and compared; the key alone finds the record.
    buffers : sequence of Tensor
        The payload: uint8, one dimension, contiguous, on the CPU; written one after the other.
    tenant : str
        Who pays for the bytes.
    meta : bytes
        Opaque; comes back with `RecordStore.info`.
    """

    key: bytes
    namespace: bytes
    buffers: Sequence[torch.Tensor]
    tenant: str = "default"
    meta: bytes = b""

    def __post_init__(self) -> None:
        if not len(self.key) == len(self.namespace) == KEY_BYTES:
            got = f"{len(self.key)} and {len(self.namespace)}"
            raise InputError(f"key and namespace must be {KEY_BYTES} bytes each, got {got}")
        if len(self.meta) > MAX_META_BYTES:
            raise InputError(f"meta must be at most {MAX_META_BYTES} bytes, got {len(self.meta)}")
        if not 0 < len(self.tenant.encode()) <= MAX_TENANT_BYTES:
            raise InputError(f"tenant must be 1 to {MAX_TENANT_BYTES} bytes in UTF-8, got {self.tenant!r}")
        for buffer in self.buffers:
            if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous() or buffer.is_cuda:
                raise InputError(
                    f"buffers must be contiguous uint8 vectors on the CPU, got {buffer.dtype} {list(buffer.shape)} on "
                    f"{buffer.device}; view them as bytes"
                )

    @property
    def payload_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() for buffer in self.buffers)


class PutState(Enum):
    """What became of a record that was put."""

    STORED = "stored"
    EXISTS = "exists"
    REFUSED = "refused"


class PutOutcome(NamedTuple):
    """``reason`` says why a record was refused, in words for a person; empty otherwise."""

    state: PutState
    reason: str = ""


class ReadRequest(NamedTuple):
    """Bytes wanted: the ``ranges`` of a payload (all of it when None), laid into ``into`` one after the other.

    ``into`` is uint8 [n], contiguous, n the sum of the lengths. Ranges ascend and do not overlap.
    """

    key: bytes
    into: torch.Tensor
    ranges: tuple[ByteRange, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordInfo:
    """What is known of a stored record without reading its payload; ``created`` in seconds since the epoch."""

    key: bytes
    namespace: bytes
    tenant: str
    payload_bytes: int
    meta: bytes
    sequence: int
    created: float
    hits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordStats:
    """Counters since the store was opened, and bytes now.

    Attributes
    ----------
    records : int
        Records that can be read.
    live_bytes, dead_bytes : int
        Bytes on the medium of records that can be read, headers and padding included, and of those that cannot.
    held_bytes : int
        Bytes that the medium holds for this store now, as the operating system counts them, index and log included.
    capacity_bytes : int
        The hard bound on ``held_bytes``.
    leased_bytes : int
        Bytes under a lease that has neither been released nor run out.
    hits, misses : int
        Reads that were served, and that were not, for whatever reason.
    damaged : int
        Reads and scans that found bytes other than those written: each a miss, and its record put aside.
    failed : int
        Reads and writes that the medium refused.
    evicted, refused, stored : int
        Records dropped for room, not taken, taken.
    read_bytes, written_bytes : int
        Payload bytes served and stored.
    degraded : str
        Why the store takes no more records at the moment; empty when it does.
    """

    records: int = 0
    live_bytes: int = 0
    dead_bytes: int = 0
    held_bytes: int = 0
    capacity_bytes: int = 0
    leased_bytes: int = 0
    hits: int = 0
    misses: int = 0
    damaged: int = 0
    failed: int = 0
    evicted: int = 0
    refused: int = 0
    stored: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    degraded: str = ""
    tenants: dict[str, int] = field(default_factory=dict)
    """Live bytes of each tenant."""


class Lease(ABC):
    """Records that are not evicted before ``deadline`` (``time.monotonic`` seconds) or `release`.

    Attributes
    ----------
    keys : tuple of bytes
        The keys that were there, in the order asked for.
    """

    owner: str
    keys: tuple[bytes, ...]
    deadline: float

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed; a reader may then meet misses."""
        return time.monotonic() >= self.deadline

    @abstractmethod
    def release(self) -> None:
        """Let the records go; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class RecordView:
    """A payload in memory, verified as far as its reader goes: what was just copied is still in the cache.

    Parameters
    ----------
    payload : Tensor
        uint8, to be left as it is.
    digested : callable
        Whether the extents that begin from one byte up to another are those that were put.
    extent_bytes : int

    Attributes
    ----------
    damaged : bool
        An extent proved wrong: nothing of the payload may be used.
    seconds : float
        Spent on verifying.
    """

    __slots__ = ("_digested", "_end", "_extent_bytes", "_verified", "damaged", "payload", "seconds")

    def __init__(self, payload: torch.Tensor, digested: Callable[[int, int], bool], extent_bytes: int) -> None:
        self.payload = payload
        self._end = payload.numel()
        self.damaged = False
        self.seconds = 0.0
        self._digested = digested
        self._extent_bytes = extent_bytes
        self._verified = 0

    @property
    def served(self) -> bool:
        """Whether all of it was verified, and is as it was put."""
        return not self.damaged and self._verified == self._end

    def verify(self, stop: int | None = None) -> bool:
        """Whether every byte before ``stop``, the end by default, is as it was put; each extent is read once."""
        end = self._end
        upto = end if stop is None else min(end, -(-stop // self._extent_bytes) * self._extent_bytes)
        if not self.damaged and upto > self._verified:
            start = time.perf_counter()
            self.damaged = not self._digested(self._verified, upto)
            self.seconds += time.perf_counter() - start
            self._verified = upto
        return not self.damaged


class RecordStore(ABC):
    """Verified records under keys, within a hard bound of bytes.

    Notes
    -----
    Any thread may call anything. A record is visible to `contains` and `read` when the `put` that brought it returns,
    never before all its bytes are written (and synced, where the store is durable).
    """

    @abstractmethod
    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Store records, laid out next to each other; one outcome each.

        A key that exists is left as it is. A full, failing or closed medium refuses; it never raises.
        """

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys have a record [n]; no I/O."""

    @abstractmethod
    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Fill each request's ``into``; True when every byte of it was verified.

        False is a miss, for any reason at all; ``into`` is then undefined and must not be used.
        """

    def view(self, keys: Sequence[bytes]) -> AbstractContextManager[Sequence[RecordView]]:
        """Whole payloads where they lie, to be copied within the ``with`` block: the leading ones that can be had.

        Only stores in memory have any; it saves them a copy. Whoever gets too few calls `read`.
        """
        del keys
        return nullcontext(())

    @abstractmethod
    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Keep those of ``keys`` that exist from being evicted for a while."""

    @abstractmethod
    def info(self, key: bytes) -> RecordInfo | None:
        """What is known of a record; None when there is none."""

    @abstractmethod
    def scan(self) -> Iterator[RecordInfo]:
        """Every record, in the order they were stored; those that come or go meanwhile may be left out."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget records for good, leased or not; how many there were. They do not come back after a crash."""

    @abstractmethod
    def clear(self, tenant: str | None = None) -> int:
        """Forget every record of a tenant, or all; how many there were."""

    @abstractmethod
    def stats(self) -> RecordStats:
        """Counters and bytes, consistent with each other."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the medium was found to be when it was opened."""

    @abstractmethod
    def flush(self) -> None:
        """Make all that is visible survive a power loss, as far as the medium can. Raises nothing; see `stats`."""

    @abstractmethod
    def close(self) -> None:
        """Flush and let go, after calls that are under way; idempotent. Later calls miss and refuse."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
