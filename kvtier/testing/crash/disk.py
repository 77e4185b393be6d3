"""A simulated block device: replays recorded calls and draws what a power loss could leave behind.

The rules are those of POSIX, read against the program: what was synced is there; of everything else any sector may be
in any of the states it went through, a file may have any of the sizes it had, and a name may or may not have been
created, moved or removed. A file's sync does not make its name last; its directory's sync does. (Real file systems are
kinder, each in its own way.) SQLite's ``-shm`` files are memory and are always lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from kvtier.errors import StorageError
from kvtier.testing.crash.log import Event, Kind
from kvtier.testing.crash.names import NameChange, NameChangeKind, SimulatedNames
from kvtier.testing.crash.sectors import FileChange, SimulatedFile

__all__ = ["SimulatedDisk", "Tree", "read_tree", "write_tree"]

Tree: TypeAlias = dict[str, "bytes | bytearray | None"]
"""Files by their names below a directory, and None for directories; a directory comes before what is in it."""

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_MOVES_BYTES = 0x08 | 0x20
_SHARED_MEMORY = "-shm"
_NAME_CHANGES = {
    Kind.RENAME: NameChangeKind.MOVE,
    Kind.LINK: NameChangeKind.LINK,
    Kind.UNLINK: NameChangeKind.REMOVE,
    Kind.MKDIR: NameChangeKind.MKDIR,
}


class SimulatedDisk:
    """The files below a directory as a sequence of recorded calls makes them.

    Parameters
    ----------
    root : Path
        The directory that was recorded.
    start : Tree, optional
        What lay in it, safely, before the first call; names relative to ``root``.
    """

    def __init__(self, root: Path, start: Tree | None = None) -> None:
        self.root = str(root)
        self.names = SimulatedNames(
            {name: None if data is None else SimulatedFile(bytearray(data)) for name, data in (start or {}).items()}
        )
        self._inodes: dict[int, SimulatedFile] = {}
        self._under_way: dict[int, Callable[[Event], None]] = {}

    def apply(self, event: Event) -> None:
        """Take the next half of a call.

        Raises
        ------
        StorageError
            A call that cannot be replayed, such as a write through a shared mapping.
        """
        if event.kind is Kind.UNTRACKED and not event.path.endswith(_SHARED_MEMORY):
            raise StorageError(f"{event.other} on {event.path} cannot be replayed; change files by write and pwrite")
        if event.ended:
            self._under_way.pop(event.call)(event)
        elif event.kind not in {Kind.MARK, Kind.UNTRACKED}:
            self._under_way[event.call] = self._begin(event)

    def crash(self, rng: np.random.Generator) -> Tree:
        """One of the states that a power loss at this moment could leave."""
        sector = int(rng.choice([512, 4096]))
        return _tree(self.names.crash(rng), lambda file: file.crash(rng, sector))

    def now(self) -> Tree:
        """What a reader sees at this moment, without a crash."""
        return _tree(self.names.now(), SimulatedFile.now)

    def _begin(self, event: Event) -> Callable[[Event], None]:
        """Begin a call; what its end will do."""
        match event.kind:
            case Kind.OPEN:
                return lambda ended: self._opened(event, ended)
            case Kind.WRITE:
                return self._write(self._file(event), event.offset, event.data, synced=bool(event.flags))
            case Kind.SIZE:
                return self._change(self._file(event), event.length, None)
            case Kind.ALLOCATE:
                return self._allocate(event)
            case Kind.SYNC | Kind.SYNC_ALL:
                return self._sync(event)
            case _:
                names = [self._name(path) for path in (event.path, event.other) if path]
                change = self.names.change(_NAME_CHANGES[event.kind], *names)
                return lambda ended: self._renamed(change, ended)

    def _change(self, file: SimulatedFile, offset: int, data: memoryview | None) -> Callable[[Event], None]:
        change = file.change(offset, data)

        def end(ended: Event) -> None:
            change.complete = True
            if ended.failed:
                file.drop(change)

        return end

    def _write(self, file: SimulatedFile, offset: int, data: memoryview, *, synced: bool) -> Callable[[Event], None]:
        change = file.change(offset, data)

        def end(ended: Event) -> None:
            change.complete = True
            if ended.failed:
                file.drop(change)
            else:
                change.data = data[: ended.result]
                file.sync([change] if synced else [])

        return end

    def _allocate(self, event: Event) -> Callable[[Event], None]:
        file = self._file(event)
        if event.flags & _MOVES_BYTES:
            raise StorageError(f"fallocate with mode {event.flags:#x} cannot be replayed; it moves bytes")
        if event.flags & (_PUNCH_HOLE | _ZERO_RANGE):
            length = min(event.length, max(0, file.size - event.offset)) if event.flags & _KEEP_SIZE else event.length
            return self._change(file, event.offset, memoryview(bytes(length)))
        size = file.size if event.flags & _KEEP_SIZE else max(file.size, event.offset + event.length)
        return self._change(file, size, None)

    def _sync(self, event: Event) -> Callable[[Event], None]:
        """A sync covers what was complete when it began, and nothing before it has returned."""
        files: list[tuple[SimulatedFile, list[FileChange]]] = []
        names: tuple[str | None, list[NameChange]] = "", []
        if event.kind is Kind.SYNC_ALL:
            files = [(file, file.settled()) for file in {*self._inodes.values(), *self._files()}]
            names = None, self.names.settled(None)
        elif self.names.is_directory(directory := self._name(event.path)):
            names = directory, self.names.settled(directory)
        else:
            file = self._file(event)
            files = [(file, file.settled())]

        def end(ended: Event) -> None:
            if not ended.failed:
                for one, changes in files:
                    one.sync(changes)
                self.names.sync(*names)

        return end

    def _opened(self, begun: Event, ended: Event) -> None:
        name, unnamed = self._name(begun.path), begun.flags & os.O_TMPFILE == os.O_TMPFILE
        if ended.failed or (self.names.is_directory(name) and not unnamed):
            return
        file = None if unnamed else self.names.now().get(name)
        if file is None:
            file = SimulatedFile(bytearray())
            if not unnamed:
                self.names.change(NameChangeKind.CREATE, name, file=file).complete = True
        elif begun.flags & os.O_TRUNC and file.size:
            file.change(0, None).complete = True
        self._inodes[ended.inode] = file

    def _renamed(self, change: NameChange, ended: Event) -> None:
        change.complete = True
        if ended.failed:
            self.names.drop(change)

    def _files(self) -> Iterator[SimulatedFile]:
        return (file for file in self.names.now().values() if file is not None)

    def _file(self, event: Event) -> SimulatedFile:
        file = self._inodes.get(event.inode) if event.inode else self.names.now().get(self._name(event.path))
        if file is None:
            raise StorageError(f"the log changes a file that it never opened: inode {event.inode}, {event.path!r}")
        return file

    def _name(self, path: str) -> str:
        """A name relative to the root."""
        if path != self.root and not path.startswith(f"{self.root}/"):
            raise StorageError(f"a rename across {self.root} cannot be replayed: {path}")
        return path[len(self.root) + 1 :]


def read_tree(directory: Path) -> Tree:
    """What lies below a directory, without SQLite's shared memory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if not path.name.endswith(_SHARED_MEMORY)
    }


def write_tree(directory: Path, tree: Tree) -> None:
    """Make files and directories below a directory."""
    for name, data in sorted(tree.items()):
        if data is None:
            (directory / name).mkdir(parents=True, exist_ok=True)
        else:
            (directory / name).write_bytes(data)


def _tree(names: dict[str, SimulatedFile | None], data: Callable[[SimulatedFile], bytes | bytearray]) -> Tree:
    return {
        name: None if file is None else data(file) for name, file in names.items() if not name.endswith(_SHARED_MEMORY)
    }
