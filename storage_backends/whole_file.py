"""A file that is there whole or not at all: written under another name, synced, then renamed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvtier.storage_backends import failpoints
from kvtier.storage_backends.engines.base import EngineFile, IOEngine
from kvtier.storage_backends.files.shelf import sync_directories

__all__ = ["whole_file"]

failpoints.NAMES |= {"whole-file.synced", "whole-file.renamed"}


@contextmanager
def whole_file(engine: IOEngine, path: Path) -> Iterator[EngineFile]:
    """A new file to write; it takes the name ``path``, and the place of what had it, when the block ends well.

    Until then it is ``.NAME.XXXXXXXX.part`` in the same directory; after an error that is removed, after a crash it may
    be left, and ``path`` is as it was.

    Raises
    ------
    OSError
        The system refuses, or the medium failed; ``path`` is as it was, unless only the sync of its directory failed.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        file = engine.open(part, writable=True, create=True)
        try:
            yield file
            file.sync()
        finally:
            file.close()
        failpoints.reach("whole-file.synced")
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    failpoints.reach("whole-file.renamed")
    sync_directories([path.parent])
