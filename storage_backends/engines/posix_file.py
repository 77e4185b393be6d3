"""Files read and written at offsets, past the page cache where the file system can (Linux): named ones and nameless."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from kvtier.errors import ConfigError, StorageError
from kvtier.record import BLOCK_BYTES
from kvtier.storage_backends.engines.base import EngineFile
from kvtier.storage_backends.memory import PAGE_BYTES
from kvtier.types import format_bytes

__all__ = ["BLOCK_BYTES", "MAX_VECTORS", "DirectVerdict", "PosixFile", "open_named", "open_nameless", "short_transfer"]

MAX_VECTORS = 1024
"""Most buffers of one system call (IOV_MAX of Linux)."""

_Vectored: TypeAlias = Callable[[int, list[memoryview], int], int]

_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_ADVICE = {
    errno.ENOSPC: "free space there, lower the capacity of the tier, or choose another directory",
    errno.EDQUOT: "raise the quota, lower the capacity of the tier, or choose another directory",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or lower the capacity of the tier",
    errno.ENOENT: "create the directory first",
    errno.EROFS: "choose a directory on a writable file system",
    errno.EACCES: "choose a directory that this user may write to",
}
_logger = logging.getLogger("kvtier.storage_backends.engines")


class DirectVerdict(NamedTuple):
    """What a trial of direct I/O found on a file system."""

    direct: bool
    note: str


class PosixFile(EngineFile):
    """An open descriptor, owned; `open_named` and `open_nameless` make one.

    Parameters
    ----------
    path : Path
        The file, or for a nameless file its directory.
    descriptor : int
        Closed with this object.

    Notes
    -----
    Transfers may run in any number of threads. The owner calls `close` only when none is under way.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.direct = False
        self.note = ""
        self._fd = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._fd).st_size

    @property
    def descriptor(self) -> int:
        """The descriptor, -1 when closed."""
        return self._fd

    @property
    def allocated_bytes(self) -> int:
        """Bytes the file system holds for the file; 0 when closed."""
        return os.fstat(self._fd).st_blocks * 512 if self._fd >= 0 else 0

    def allocate(self, size: int) -> None:
        """Make the file ``size`` bytes long with all of its space taken.

        Raises
        ------
        OSError
            There is none; the size is as before.
        """
        before = self.size
        if size < before:
            os.ftruncate(self._fd, size)
        if not size:
            return
        # Where the file system cannot reserve, libc writes a byte into each block, which a direct descriptor refuses.
        with self._buffered() as descriptor:
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError:
                os.ftruncate(descriptor, min(before, size))
                raise

    def sync(self) -> None:
        """Wait until everything written is on the medium."""
        os.fdatasync(self._fd)

    def read_at(self, buffers: list[memoryview], offset: int) -> None:
        """Fill the buffers, one after the other, from ``offset``; all aligned if the file is direct.

        Raises
        ------
        OSError
            The device failed, or the file ends early (``EIO``).
        """
        self._transfer(os.preadv, self._fd, buffers, offset)

    def read_blocks(self, buffer: memoryview, offset: int, needed: int) -> None:
        """Fill at least the first ``needed`` bytes of an aligned buffer: the file may end within its last block."""
        done = 0
        while done < needed:
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            whole = count // BLOCK_BYTES * BLOCK_BYTES
            if not whole and done + count < needed:
                raise short_transfer(self.path, offset + done + count)
            done += whole or count

    def write_at(self, buffers: list[memoryview], offset: int) -> None:
        """Write the buffers, one after the other, from ``offset``; all aligned if the file is direct.

        Raises
        ------
        OSError
            The device failed or is full; the range is undefined.
        """
        self._transfer(os.pwritev, self._fd, buffers, offset)

    def write_span(self, buffer: memoryview, first: int, skipped: int) -> None:
        """Write an aligned buffer but for its first ``skipped`` bytes; its start belongs at ``first``, a whole block.

        Parts of blocks at both ends go through the page cache, so that what lies around them is left alone.
        """
        head = -(-skipped // BLOCK_BYTES) * BLOCK_BYTES
        body = max(head, buffer.nbytes // BLOCK_BYTES * BLOCK_BYTES)
        for start, stop in ((skipped, min(head, buffer.nbytes)), (body, buffer.nbytes)):
            if start < stop:
                with self._buffered() as descriptor:
                    self._transfer(os.pwritev, descriptor, [buffer[start:stop]], first + start, unit=1)
        if head < body:
            self.write_at([buffer[head:body]], first + head)

    def truncate(self, size: int) -> None:
        """Make the file ``size`` bytes long without taking space."""
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        """Close the file; a nameless one frees its space. Idempotent; whatever comes later fails with ``EBADF``."""
        self._fd = -1
        self._close()

    def try_direct(self, *, scratch: bool) -> None:
        """Switch to direct I/O if a block survives the round trip; else say why not in `note`.

        Parameters
        ----------
        scratch : bool
            The first block may be overwritten. If not, it is read in both ways and compared.

        Raises
        ------
        OSError
            No space for the one block of the trial.
        """
        kind = _file_system(self._fd)
        in_memory = f"{kind} takes host memory, not disk" if kind in {"tmpfs", "ramfs"} else ""
        problem = _direct_problem(self._fd, scratch=scratch)
        self.direct = not problem
        buffered = f"no direct I/O on {kind} ({problem}): transfers go through the page cache" if problem else ""
        self.note = "; ".join(filter(None, (in_memory, buffered)))

    @property
    def verdict(self) -> DirectVerdict:
        """What the trial found."""
        return DirectVerdict(self.direct, self.note)

    def take_verdict(self, verdict: DirectVerdict) -> None:
        """Be direct if another file on the same file system was found to be, without a trial."""
        self.note = verdict.note
        if verdict.direct:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_DIRECT)
            self.direct = True

    @property
    def device(self) -> int:
        """Number of the file system that the file lies on."""
        return os.fstat(self._fd).st_dev

    @contextmanager
    def _buffered(self) -> Iterator[int]:
        """Lend a descriptor of the same file that takes any offset, length and address."""
        if not self.direct:
            yield self._fd
            return
        descriptor = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _transfer(
        self, call: _Vectored, descriptor: int, buffers: list[memoryview], offset: int, unit: int | None = None
    ) -> None:
        """Repeat the system call until every byte went through: the kernel may stop short at any point."""
        unit = unit or (BLOCK_BYTES if self.direct else 1)
        left = sum(buffer.nbytes for buffer in buffers)
        while left:
            done = call(descriptor, buffers[:MAX_VECTORS], offset)
            if done == left:
                return
            done = done // unit * unit
            if not done:
                raise short_transfer(self.path, offset)
            offset += done
            left -= done
            buffers = _without(buffers, done)


def open_named(path: Path, *, writable: bool, create: bool = False) -> PosixFile:
    """Open a file, mode 0600 if it is made; not direct yet.

    Raises
    ------
    OSError
        The system refuses.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_CREAT if create else 0)
    return PosixFile(path, os.open(path, flags, 0o600))


def open_nameless(directory: Path, size: int) -> PosixFile:
    """Open a file of fixed size that no directory names, so that nothing stays, whatever ends the process.

    Parameters
    ----------
    directory : Path
        Where its space comes from; must exist.
    size : int
        Bytes, all allocated at once; a multiple of 4096.

    Raises
    ------
    StorageError
        No such directory, no permission, or not enough space; nothing is left behind.
    """
    if size % BLOCK_BYTES:
        raise ConfigError(f"the size of the file must be a multiple of {BLOCK_BYTES} bytes, got {size}")
    try:
        file = PosixFile(directory, _nameless_descriptor(directory))
    except OSError as error:
        raise _cannot_open(directory, size, error) from error
    try:
        file.allocate(size)
        if size:
            file.try_direct(scratch=True)
    except OSError as error:
        file.close()
        raise _cannot_open(directory, size, error) from error
    if file.note:
        _logger.warning("spill file in %s: %s", directory, file.note)
    return file


def _without(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The buffers but for their first ``count`` bytes."""
    for number, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[number + 1 :]]
        count -= buffer.nbytes
    return []


def short_transfer(path: Path, offset: int) -> OSError:
    """Build the error of a file or device that gives or takes no more."""
    return OSError(errno.EIO, f"the transfer stopped short at byte {offset}", str(path))


def _nameless_descriptor(directory: Path) -> int:
    """Open a file that only this descriptor leads to, mode 0600."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE or not directory.is_dir():
            raise
    descriptor, name = tempfile.mkstemp(prefix=".kvtier-spill-", dir=directory)
    Path(name).unlink()
    return descriptor


def _direct_problem(descriptor: int, *, scratch: bool) -> str:
    """Leave the descriptor direct and return nothing, or as it was and return the reason."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with mmap.mmap(-1, PAGE_BYTES) as block:
        try:
            if scratch:
                block[:] = bytes(range(256)) * (BLOCK_BYTES // 256)
            else:
                os.preadv(descriptor, [block], 0)
            expected = block[:]
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            if scratch:
                os.pwritev(descriptor, [block], 0)
            block[:] = bytes(BLOCK_BYTES)
            os.preadv(descriptor, [block], 0)
            problem = "" if block[:] == expected else "a block read back differed"
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
            problem = error.strerror or str(error)
    if problem:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return problem


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
