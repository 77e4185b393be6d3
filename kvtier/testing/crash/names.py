"""The names of a simulated disk: which are there for sure, and which creations, moves and removals may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from kvtier.errors import StorageError
from kvtier.testing.crash.sectors import SimulatedFile

__all__ = ["NameChange", "NameChangeKind", "SimulatedNames"]


class NameChangeKind(Enum):
    """What happens to a name."""

    CREATE = "create"
    MKDIR = "mkdir"
    MOVE = "move"
    LINK = "link"
    REMOVE = "remove"


@dataclass(slots=True, eq=False)
class NameChange:
    """A change of one name, or of the two of a rename or link, which happen together or not at all.

    Attributes
    ----------
    unsynced : set of str
        Directories whose sync is still missing.
    """

    kind: NameChangeKind
    names: tuple[str, ...]
    file: SimulatedFile | None = None
    complete: bool = False
    unsynced: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.unsynced = {_parent(name) for name in self.names}


@dataclass(slots=True)
class SimulatedNames:
    """Names relative to the root of a `SimulatedDisk`, and the files under them; None for a directory."""

    durable: dict[str, SimulatedFile | None]
    pending: list[NameChange] = field(default_factory=list)

    def change(self, kind: NameChangeKind, *names: str, file: SimulatedFile | None = None) -> NameChange:
        """Begin a change."""
        change = NameChange(kind, names, file)
        if kind is NameChangeKind.MOVE and self.is_directory(names[0]):
            raise StorageError(f"moving the directory {names[0]} cannot be replayed")
        self.pending.append(change)
        return change

    def drop(self, change: NameChange) -> None:
        """Forget a change that failed."""
        self.pending.remove(change)

    def now(self) -> dict[str, SimulatedFile | None]:
        """Names as a reader sees them."""
        names = dict(self.durable)
        for change in self.pending:
            _apply(names, change)
        return names

    def is_directory(self, name: str) -> bool:
        """Whether the name is that of a directory; the root is the empty name."""
        return not name or self.now().get(name, _NOTHING) is None

    def settled(self, directory: str | None) -> list[NameChange]:
        """The changes that a sync of a directory (None: of everything) beginning now will cover."""
        return [change for change in self.pending if change.complete and directory in {None, *change.unsynced}]

    def sync(self, directory: str | None, changes: Sequence[NameChange]) -> None:
        """Make changes last, as far as this directory has to do with them."""
        for change in changes:
            change.unsynced -= change.unsynced if directory is None else {directory}
        waiting: list[NameChange] = []
        blocked: set[str] = set()
        for change in self.pending:
            # In order: a later change of a name does not last before an earlier one.
            if change.unsynced or blocked.intersection(change.names):
                waiting.append(change)
                blocked.update(change.names)
            else:
                _apply(self.durable, change)
        self.pending = waiting

    def crash(self, rng: np.random.Generator) -> dict[str, SimulatedFile | None]:
        """Files that a power loss may leave: of each group of changes with common names, those up to a moment."""
        left = dict(self.durable)
        weight = float(rng.choice([0.0, 0.5, 1.0, 2.0, 100.0]))
        for group in _groups(self.pending):
            for change in group[: int((len(group) + 1) * rng.random() ** weight * 0.999999)]:
                _apply(left, change)
        present = {"", *(name for name, file in left.items() if file is None)}
        return {name: file for name, file in left.items() if all(parent in present for parent in _parents(name))}


_NOTHING = SimulatedFile(bytearray())


def _apply(names: dict[str, SimulatedFile | None], change: NameChange) -> None:
    """Change names as the call changed the directory."""
    first = change.names[0]
    match change.kind:
        case NameChangeKind.CREATE | NameChangeKind.MKDIR:
            names[first] = change.file
        case NameChangeKind.REMOVE:
            names.pop(first, None)
        case NameChangeKind.LINK if first in names:
            names[change.names[1]] = names[first]
        case NameChangeKind.MOVE if first in names:
            names[change.names[1]] = names.pop(first)


def _groups(changes: Sequence[NameChange]) -> list[list[NameChange]]:
    """Changes that have names in common, directly or through others, in their order."""
    groups: list[tuple[set[str], list[NameChange]]] = []
    for change in changes:
        touching = [group for group in groups if group[0].intersection(change.names)]
        groups = [group for group in groups if group not in touching]
        order = {id(one): at for at, one in enumerate(changes)}
        members = sorted([one for _, group in touching for one in group] + [change], key=lambda one: order[id(one)])
        groups.append((set(change.names).union(*(names for names, _ in touching)), members))
    return [members for _, members in groups]


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
