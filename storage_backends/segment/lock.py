"""One writer, or any number of readers, in a segment directory: an advisory lock that dies with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path

from kvtier.errors import StorageError, StoreInUseError

__all__ = ["LOCK_NAME", "DirectoryLock"]

LOCK_NAME = "lock"
_OWNER_BYTES = 1024


class DirectoryLock:
    """Holds a directory until it is released or the process ends.

    Parameters
    ----------
    directory : Path
        Must exist.
    shared : bool
        For reading only: beside others that read, never beside one that writes. Writes nothing.

    Attributes
    ----------
    owner : str
        Unique name of this holder.

    Raises
    ------
    StoreInUseError
        Somebody else holds the directory; the message says who.
    StorageError
        The lock file cannot be opened.
    """

    def __init__(self, directory: Path, *, shared: bool) -> None:
        self.owner = str(uuid.uuid4())
        self._path = directory / LOCK_NAME
        flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
        try:
            self._fd: int | None = os.open(self._path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            advice = "choose a directory that this user may write to"
            if shared and isinstance(error, FileNotFoundError):
                advice = "is it a segment directory? A copy of one needs an empty file of this name"
            elif shared:
                advice = "look at it as a user who may read it"
            raise StorageError(f"cannot open {self._path} ({error.strerror}); {advice}") from error
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(self._fd)
            self.release()
            raise StoreInUseError(
                f"required {directory} for this process alone, got it held by {holder}; close it there, or choose "
                "another directory"
            ) from error
        if not shared:
            self._sign(self._fd)

    def release(self) -> None:
        """Let the directory go. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _sign(self, descriptor: int) -> None:
        """Write down who holds it; the lock holds without, so a full disk does not matter."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        who = {"pid": os.getpid(), "host": socket.gethostname()[:256], "id": self.owner, "since": since}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(who).encode(), 0)
        except OSError:
            pass


def _holder(descriptor: int) -> str:
    """Who signed the lock file, for a message."""
    try:
        who = json.loads(os.pread(descriptor, _OWNER_BYTES, 0))
        return f"process {int(who['pid'])} on {who['host']!s:.64} since {who['since']!s:.32} ({who['id']!s:.36})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
