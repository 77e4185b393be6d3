"""Linux's native asynchronous I/O (``io_submit``): many direct transfers under way from one thread."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import platform
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["KernelQueue", "QueuePool", "Verb"]


class Verb(NamedTuple):
    """What a queue can be asked for, as the kernel numbers it: of one buffer, and of several."""

    one: int
    several: int


READ, WRITE = Verb(0, 7), Verb(1, 8)

_CALLS = {
    "x86_64": {"setup": 206, "destroy": 207, "getevents": 208, "submit": 209},
    "aarch64": {"setup": 0, "destroy": 1, "submit": 2, "getevents": 4},
}
"""Numbers of the system calls, for which the C library has no functions."""

_REQUEST = struct.Struct("<QIIHhIQQqQII")  # struct iocb of a little-endian machine
_EVENT = struct.Struct("<QQqq")  # struct io_event
_VECTOR_BYTES = 16  # struct iovec: address and length
_MOST_VECTORS = 1024


class KernelQueue:
    """A queue of the kernel; one thread at a time uses it.

    Parameters
    ----------
    depth : int
        Most transfers under way.

    Raises
    ------
    OSError
        The machine, the kernel or a filter of system calls has none to give.

    Notes
    -----
    Buffers must stay where they are until `wait` told of their transfer: whoever submits also waits for all of it.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.under_way = 0
        numbers = _CALLS.get(platform.machine())
        if numbers is None:
            raise OSError(errno.ENOSYS, f"the system calls of {platform.machine()} are not known")
        self._numbers = numbers
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._context = ctypes.c_ulong(0)
        self._request = ctypes.create_string_buffer(_REQUEST.size)
        self._pointer = ctypes.c_void_p(ctypes.addressof(self._request))
        self._vectors = ctypes.create_string_buffer(_VECTOR_BYTES * _MOST_VECTORS)
        self._events = ctypes.create_string_buffer(_EVENT.size * depth)
        self._most = ctypes.c_long(depth)
        self._call("setup", ctypes.c_long(depth), ctypes.byref(self._context))

    def submit(self, verb: Verb, token: int, descriptor: int, offset: int, parts: Sequence[tuple[int, int]]) -> None:
        """Begin a transfer of memory, parts of (address, bytes) one after the other; `wait` tells its token.

        Raises
        ------
        OSError
            Nothing was begun.
        """
        if len(parts) == 1:
            (where, count), number = parts[0], verb.one
        else:
            if len(parts) > _MOST_VECTORS:
                raise OSError(errno.EINVAL, f"at most {_MOST_VECTORS} parts of a transfer, got {len(parts)}")
            numbers = itertools.chain.from_iterable(parts)
            struct.pack_into(f"<{2 * len(parts)}Q", self._vectors, 0, *numbers)  # array of struct iovec
            where, count, number = ctypes.addressof(self._vectors), len(parts), verb.several
        _REQUEST.pack_into(self._request, 0, token, 0, 0, number, 0, descriptor, where, count, offset, 0, 0, 0)
        if self._call("submit", self._context, ctypes.c_long(1), ctypes.byref(self._pointer)) != 1:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.under_way += 1

    def wait(self) -> list[tuple[int, int]]:
        """Transfers that ended, at least one if any is under way: token, and bytes or a negative error number."""
        told: list[tuple[int, int]] = []
        while self.under_way and not told:
            told = self._ended(1)
        return told

    def look(self) -> list[tuple[int, int]]:
        """Transfers that ended, without waiting for any."""
        return self._ended(0) if self.under_way else []

    def _ended(self, least: int) -> list[tuple[int, int]]:
        """Up to `depth` transfers that ended, once there are ``least`` or a signal came."""
        try:
            count = self._call("getevents", self._context, ctypes.c_long(least), self._most, self._events, None)
        except InterruptedError:
            return []
        self.under_way -= count
        told = _EVENT.iter_unpack(memoryview(self._events)[: count * _EVENT.size])
        return [(token, result) for token, _, result, _ in told]

    def close(self) -> None:
        """Give it back to the kernel, when nothing is under way; idempotent."""
        context, self._context = self._context, ctypes.c_ulong(0)
        if context.value:
            self._call("destroy", context)

    def _call(self, name: str, *arguments: object) -> int:
        done: int = self._libc.syscall(ctypes.c_long(self._numbers[name]), *arguments)
        if done < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return done


class QueuePool:
    """Lends queues, one for each call under way, where there are any.

    Parameters
    ----------
    depth : int
        Of each.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._idle: list[KernelQueue] = []
        self._lock = threading.Lock()

    def take(self) -> KernelQueue | None:
        """A queue with nothing under way; None when the kernel has none to give now."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        try:
            return KernelQueue(self._depth)
        except OSError:
            return None

    def give(self, queue: KernelQueue) -> None:
        """Take a queue back."""
        with self._lock:
            self._idle.append(queue)

    def close(self) -> None:
        """Close the idle ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for queue in idle:
            queue.close()
