"""A nameless, preallocated file read and written at offsets, past the page cache where the file system can (Linux)."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from kvtier.errors import ConfigError, StorageError
from kvtier.storage_backends.memory import PAGE_BYTES
from kvtier.types import format_bytes

__all__ = ["BLOCK_BYTES", "MAX_VECTORS", "DirectFile"]

BLOCK_BYTES = 4096
"""Address, offset and length of direct transfers are multiples of it; no current device asks for more."""

MAX_VECTORS = 1024
"""Most buffers of one system call (IOV_MAX of Linux)."""

_Vectored: TypeAlias = Callable[[int, list[memoryview], int], int]

_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
_ADVICE = {
    errno.ENOSPC: "free space there, lower the capacity of the tier, or choose another directory",
    errno.EDQUOT: "raise the quota, lower the capacity of the tier, or choose another directory",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or lower the capacity of the tier",
    errno.ENOENT: "create the directory first",
    errno.EROFS: "choose a directory on a writable file system",
    errno.EACCES: "choose a directory that this user may write to",
}
_logger = logging.getLogger("kvtier.storage_backends.direct_file")


class DirectFile:
    """One file of fixed size that no directory names, so that nothing is left behind, whatever ends the process.

    Parameters
    ----------
    directory : Path
        Where its space comes from; must exist.
    size : int
        Bytes, all allocated at once; a multiple of 4096.

    Attributes
    ----------
    direct : bool
        Transfers bypass the page cache (``O_DIRECT``); then addresses, offsets and lengths are multiples of 4096.
    note : str
        Why not, or that the file system lies in memory; empty when all is well.

    Raises
    ------
    StorageError
        No such directory, no permission, or not enough space; nothing is left behind.

    Notes
    -----
    Transfers may run in any number of threads. The owner calls `close` only when none is under way.
    """

    def __init__(self, directory: Path, size: int) -> None:
        if size % BLOCK_BYTES:
            raise ConfigError(f"the size of the file must be a multiple of {BLOCK_BYTES} bytes, got {size}")
        self.size = size
        try:
            self._fd = _open_nameless(directory)
        except OSError as error:
            raise _cannot_open(directory, size, error) from error
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            if size:
                os.posix_fallocate(self._fd, 0, size)
            self.direct, self.note = _try_direct(self._fd, size)
        except OSError as error:
            self.close()
            raise _cannot_open(directory, size, error) from error
        if self.note:
            _logger.warning("spill file in %s: %s", directory, self.note)

    @property
    def allocated_bytes(self) -> int:
        """Bytes the file system holds for the file; 0 when closed."""
        return os.fstat(self._fd).st_blocks * 512 if self._close.alive else 0

    def read_at(self, buffers: list[memoryview], offset: int) -> None:
        """Fill the buffers, one after the other, from ``offset``.

        Raises
        ------
        OSError
            The device failed, or the file ends early (``EIO``).
        """
        self._transfer(os.preadv, buffers, offset)

    def write_at(self, buffers: list[memoryview], offset: int) -> None:
        """Write the buffers, one after the other, from ``offset``.

        Raises
        ------
        OSError
            The device failed or is full; the range is undefined.
        """
        self._transfer(os.pwritev, buffers, offset)

    def close(self) -> None:
        """Close the file, which frees its space. Idempotent."""
        self._close()

    def _transfer(self, call: _Vectored, buffers: list[memoryview], offset: int) -> None:
        """Repeat the system call until every byte went through: the kernel may stop short at any point."""
        unit = BLOCK_BYTES if self.direct else 1
        buffers = list(buffers)
        while buffers:
            done = call(self._fd, buffers, offset) // unit * unit
            if not done:
                raise OSError(errno.EIO, f"the transfer stopped short at byte {offset} of {self.size}")
            offset += done
            while done and done >= buffers[0].nbytes:
                done -= buffers.pop(0).nbytes
            if done:
                buffers[0] = buffers[0][done:]


def _open_nameless(directory: Path) -> int:
    """Open a file that only this descriptor leads to, mode 0600."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE or not directory.is_dir():
            raise
    descriptor, name = tempfile.mkstemp(prefix=".kvtier-spill-", dir=directory)
    Path(name).unlink()
    return descriptor


def _try_direct(descriptor: int, size: int) -> tuple[bool, str]:
    """Switch the descriptor to direct I/O if a block survives the round trip; else say why not."""
    kind = _file_system(descriptor)
    in_memory = f"{kind} takes host memory, not disk" if kind in {"tmpfs", "ramfs"} else ""
    if not size:
        return False, in_memory
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    block = mmap.mmap(-1, PAGE_BYTES)
    try:
        block[:] = bytes(range(256)) * (BLOCK_BYTES // 256)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwritev(descriptor, [block], 0)
        expected = block[:]
        block[:] = bytes(BLOCK_BYTES)
        os.preadv(descriptor, [block], 0)
        problem = "" if block[:] == expected else "a block read back differed"
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        problem = error.strerror or str(error)
    finally:
        block.close()
    if problem:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        buffered = f"no direct I/O on {kind} ({problem}): transfers go through the page cache"
        return False, f"{in_memory}; {buffered}" if in_memory else buffered
    return True, in_memory


def _file_system(descriptor: int) -> str:
    """Type of the file system below the descriptor, such as ``ext4``."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        mounts = []
    for fields in map(str.split, mounts):
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return "this file system"


def _cannot_open(directory: Path, size: int, error: OSError) -> StorageError:
    """Build the error of a file that could not be had: required, got, what to do."""
    try:
        state = os.statvfs(directory)
        got = f"{format_bytes(state.f_bavail * state.f_frsize)} free"
    except OSError:
        got = "nothing"
    advice = _ADVICE.get(error.errno or 0, "choose another directory")
    required = f"required {format_bytes(size)}, got {got} ({error.strerror})"
    return StorageError(f"cannot have a spill file in {directory}: {required}; {advice}")
