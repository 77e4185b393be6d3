"""Leases of records: who holds which key until when; shared by the record stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvtier.storage_backends.records import Lease

__all__ = ["JoinedLease", "LeaseBook"]


class _BookedLease(Lease):
    """A lease that is written in a book until it is released."""

    def __init__(self, book: LeaseBook, owner: str, keys: tuple[bytes, ...], deadline: float) -> None:
        self.owner = owner
        self.keys = keys
        self.deadline = deadline
        self._book: LeaseBook | None = book

    def release(self) -> None:
        """Let the records go; a second call does nothing."""
        book, self._book = self._book, None
        if book is not None:
            book.strike(self)


class LeaseBook:
    """Which keys are under a lease that has neither been released nor run out.

    Notes
    -----
    Thread-safe, with a lock of its own that is never held while calling out: a store may use it under its own lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: dict[bytes, list[Lease]] = {}

    def take(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """A lease of ``keys``, which the caller knows to exist."""
        lease = _BookedLease(self, owner, tuple(keys), time.monotonic() + seconds)
        with self._lock:
            for key in lease.keys:
                self._leases.setdefault(key, []).append(lease)
        return lease

    def holds(self, key: bytes) -> bool:
        """Whether a key is leased now."""
        with self._lock:
            return self._held(key)

    def keys(self) -> list[bytes]:
        """Every key that is leased now."""
        with self._lock:
            return [key for key in list(self._leases) if self._held(key)]

    def strike(self, lease: Lease) -> None:
        """Forget a lease."""
        with self._lock:
            for key in lease.keys:
                left = [other for other in self._leases.get(key, ()) if other is not lease]
                if left:
                    self._leases[key] = left
                else:
                    self._leases.pop(key, None)

    def _held(self, key: bytes) -> bool:
        """Whether a key is leased; what has run out is forgotten. Called with the lock held."""
        leases = self._leases.get(key)
        if leases is None:
            return False
        running = [lease for lease in leases if not lease.expired]
        if running:
            self._leases[key] = running
        else:
            del self._leases[key]
        return bool(running)


class JoinedLease(Lease):
    """Several leases that are released together; ``keys`` are those that any of them holds, in the order asked for."""

    def __init__(self, leases: Sequence[Lease], asked: Sequence[bytes]) -> None:
        held = {key for lease in leases for key in lease.keys}
        self.owner = leases[0].owner
        self.keys = tuple(key for key in asked if key in held)
        self.deadline = min(lease.deadline for lease in leases)
        self._leases = tuple(leases)

    def release(self) -> None:
        """Release all of them; a second call does nothing."""
        for lease in self._leases:
            lease.release()
