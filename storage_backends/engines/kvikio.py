"""The kvikio engine: files to and from GPU memory by GPUDirect Storage, or through host memory where there is none."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kvtier.errors import ConfigError, InputError, MissingDependencyError, StorageError
from kvtier.storage_backends.engines.base import EngineCapabilities, EngineFile, IOEngine, Transfer
from kvtier.storage_backends.engines.batch import Batch
from kvtier.storage_backends.engines.gate import Gate
from kvtier.storage_backends.engines.kvikio_trial import try_kvikio
from kvtier.storage_backends.engines.plan import Job, Part
from kvtier.storage_backends.engines.posix import DEFAULT_THREADS
from kvtier.storage_backends.engines.posix_file import PosixFile, open_named, short_transfer

__all__ = ["KvikioEngine", "KvikioFile"]

_TOLD_BY_TEXT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT, errno.EACCES, errno.EROFS, errno.EPERM)


class KvikioFile(EngineFile):
    """A file that kvikio transfers, and POSIX calls measure, allocate and sync.

    Parameters
    ----------
    file : PosixFile
        The same file, owned.
    handle : kvikio.CuFile
        Owned.
    """

    def __init__(self, file: PosixFile, handle: Any) -> None:
        self.path = file.path
        self.direct = bool(handle.is_direct_io_supported)
        self.note = "" if self.direct else "no direct I/O here, kvikio found: transfers go through the page cache"
        self.handle = handle
        self._file = file

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.size

    @property
    def allocated_bytes(self) -> int:
        """Bytes the file system holds for the file; 0 when closed."""
        return self._file.allocated_bytes

    def allocate(self, size: int) -> None:
        """Make the file ``size`` bytes long with all of its space taken."""
        self._file.allocate(size)

    def sync(self) -> None:
        """Wait until everything written is on the medium."""
        self._file.sync()

    def close(self) -> None:
        """Close it in both libraries."""
        self.handle.close()
        self._file.close()


class KvikioEngine(IOEngine):
    """NVIDIA's kvikio behind the engine interface.

    Parameters
    ----------
    threads : int
        Most transfers under way at once for one call, and threads of kvikio's own pool, in which each transfer is cut.
    directory : Path, optional
        Where the trial lays its file: best the file system that will be used. The temporary directory by default.

    Raises
    ------
    MissingDependencyError
        kvikio is not installed.
    StorageError
        The trial in a process of its own failed or took too long.

    Notes
    -----
    kvikio's settings belong to the process: direct I/O for host buffers and the number of threads are set here, its
    compatibility mode never is. A ``then`` that verifies a CUDA buffer digests `host_bytes` of it, which is a copy.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, *, directory: Path | None = None) -> None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        if importlib.util.find_spec("kvikio") is None:
            raise MissingDependencyError("the kvikio engine needs kvikio; pip install kvikio-cu13 (or kvikio-cu12)")
        place = Path(tempfile.gettempdir()) if directory is None else directory
        self._trial = try_kvikio(place, cuda=torch.cuda.is_available())
        if not self._trial.usable:
            raise StorageError(f"kvikio does not work here: {self._trial.reason}; use the posix engine")
        self._kvikio: Any = importlib.import_module("kvikio")
        defaults: Any = importlib.import_module("kvikio.defaults")
        defaults.set({"num_threads": threads, "auto_direct_io_read": True, "auto_direct_io_write": True})
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="kvtier-kvikio")
        self._gate = Gate("the I/O engine")

    def open(self, path: Path, *, writable: bool, create: bool = False) -> KvikioFile:
        """Open a file in kvikio and beside it."""
        with self._gate:
            file = open_named(path, writable=writable, create=create)
            try:
                return KvikioFile(file, self._kvikio.CuFile(path, "r+" if writable else "r"))
            except RuntimeError as error:
                file.close()
                raise _as_os_error(error, path) from error

    def read(self, transfers: Iterable[Transfer], then: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Fill the buffers, in host or GPU memory."""
        batch = Batch(list(transfers), after=then)
        return self._run(batch, lambda file: file.handle.pread)

    def write(self, transfers: Iterable[Transfer], before: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Write the buffers, in host or GPU memory."""
        batch = Batch(list(transfers), before=before)
        return self._run(batch, lambda file: file.handle.pwrite)

    def capabilities(self) -> EngineCapabilities:
        """What the trial found, the mode among it."""
        return EngineCapabilities(
            name="kvikio",
            cuda_buffers=self._trial.cuda,
            gpu_direct=self._trial.cuda and self._trial.gpu_direct,
            note=f"kvikio {self._trial.version}, {self._trial.mode}; what a GPU read is verified on a host copy",
        )

    def close(self) -> None:
        """Wait for transfers and stop the threads; kvikio keeps its own pool."""
        if self._gate.shut():
            self._pool.shutdown(wait=True)

    def _run(self, batch: Batch, verb: Callable[[KvikioFile], Callable[..., Any]]) -> list[OSError | None]:
        """One job a buffer: kvikio cuts and aligns by itself."""
        transfers = batch.transfers
        jobs = []
        for index, transfer in enumerate(transfers):
            _own(transfer.file)
            stop = 0
            for buffer in transfer.buffers:
                start, stop = stop, stop + buffer.numel()
                if start < stop:
                    part = Part(index, start, stop)
                    jobs.append(Job(transfer.file, transfer.offset + start, [part], straight=True))

        def move(job: Job) -> None:
            file, (part,) = _own(job.file), job.parts
            for buffer, low, high in transfers[part.transfer].spans(part.start, part.stop):
                _transfer(verb(file), file, job.offset, buffer[low:high])

        with self._gate:
            return batch.run(iter(jobs), move, self._pool, self._threads)


def _transfer(call: Callable[..., Any], file: KvikioFile, offset: int, buffer: torch.Tensor) -> None:
    """Repeat the call until every byte went through."""
    if file.handle.closed:
        raise OSError(errno.EBADF, f"the file was closed: {file.path}")
    done = 0
    while done < buffer.numel():
        rest = buffer[done:]
        try:
            count = int(call(rest if rest.is_cuda else rest.numpy(), file_offset=offset + done).get())
        except RuntimeError as error:
            raise _as_os_error(error, file.path) from error
        if not count:
            raise short_transfer(file.path, offset + done)
        done += count


def _own(file: EngineFile) -> KvikioFile:
    """The file, which this engine must have opened."""
    if not isinstance(file, KvikioFile):
        raise InputError(f"required a file that this engine opened, got {type(file).__name__}; open it with this one")
    return file


def _as_os_error(error: RuntimeError, path: Path) -> OSError:
    """Build the error that the system gave: kvikio hands on its text alone."""
    text = str(error)
    code = next((code for code in _TOLD_BY_TEXT if os.strerror(code) in text), errno.EIO)
    return OSError(code, text, str(path))
