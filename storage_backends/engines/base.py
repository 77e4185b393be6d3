"""The I/O engine: batches of reads and writes between files and tensors, with work done where the bytes arrive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["EngineCapabilities", "EngineFile", "IOEngine", "Transfer", "host_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine found out when it was made.

    Parameters
    ----------
    name : str
        ``"posix"`` or ``"kvikio"``.
    cuda_buffers : bool
        Transfers may name CUDA tensors.
    gpu_direct : bool
        Such transfers do not pass through host memory (GPUDirect Storage is active, not its compatibility mode).
    note : str
        What a user should know, such as why a fallback was taken.
    """

    name: str
    cuda_buffers: bool = False
    gpu_direct: bool = False
    note: str = ""


class EngineFile(ABC):
    """An open file of an engine.

    Attributes
    ----------
    path : Path
    direct : bool
        Transfers bypass the page cache: offsets, lengths and addresses that are multiples of 4096 go through as they
        are, others through an aligned buffer.
    note : str
        Why not, or what else a user should know; empty when all is well.
    """

    path: Path
    direct: bool
    note: str

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the file."""

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes that the file system holds for it (``st_blocks``); 0 when closed."""

    @abstractmethod
    def allocate(self, size: int) -> None:
        """Make the file ``size`` bytes long with all of its space taken; OSError when there is none."""

    @abstractmethod
    def sync(self) -> None:
        """Wait until everything written is on the medium (fdatasync); OSError when the medium failed."""

    @abstractmethod
    def close(self) -> None:
        """Close it, when no transfer is under way; idempotent."""


class Transfer(NamedTuple):
    """Bytes of a file from ``offset`` on, and the uint8 vector that they come from or go to.

    ``behind`` are more of them, for the bytes that follow: many small neighbours cost little more than one. All lie in
    host memory then. What becomes of them becomes of all.
    """

    file: EngineFile
    offset: int
    buffer: torch.Tensor
    behind: Sequence[torch.Tensor] = ()


class IOEngine(ABC):
    """Moves batches; blocking, several transfers at a time, from any number of threads.

    Notes
    -----
    Transfers of one batch run in no particular order; writes that overlap, in one batch or several, leave either's
    bytes. A transfer that fails leaves its range of the buffers or the file undefined, and the others alone. After
    `close`, every call raises `StorageError`. A buffer that is not a contiguous uint8 vector, several of them on a GPU,
    or a negative offset, is an `InputError` before anything of a sequence is transferred.
    """

    @abstractmethod
    def open(self, path: Path, *, writable: bool, create: bool = False) -> EngineFile:
        """Open a file; OSError when the system refuses."""

    @abstractmethod
    def read(self, transfers: Iterable[Transfer], then: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Fill the buffers; one result each, None for every byte read. A short file is an OSError (EIO).

        Transfers that are no sequence are drawn while the first of them are under way; those next to each other in a
        file should follow one another. What drawing them raises is raised here, after those under way have ended.

        ``then(i)`` runs in the thread that sees transfer i succeed, beside the others: the place to compute digests,
        which take `host_bytes` of a buffer that may lie on a GPU. What it raises is raised here, after all transfers
        have ended.
        """

    @abstractmethod
    def write(self, transfers: Iterable[Transfer], before: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Write the buffers; one result each.

        Transfers that are no sequence are drawn while the first of them are under way, in any thread but one at a time,
        and begun in that order: a buffer may be filled in the moment before it is drawn. What drawing them raises is
        raised here, after those under way have ended.

        ``before(i)`` runs ahead of transfer i, in any thread and beside others, and may still change its buffer. If it
        raises, transfer i is left out, and the error is raised here, after the others have ended.
        """

    @abstractmethod
    def capabilities(self) -> EngineCapabilities:
        """What the engine can do here."""

    @abstractmethod
    def close(self) -> None:
        """Stop its threads, after what is under way; idempotent. Files are closed by their owners before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def host_bytes(buffer: torch.Tensor) -> torch.Tensor:
    """The bytes of a buffer in host memory, for a digest: itself on the CPU, a copy from a GPU."""
    return buffer.cpu() if buffer.is_cuda else buffer
