"""What a worker said it would do and what was acknowledged, and what therefore may be in the store after a crash."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from kvtier.testing.crash.recorder import mark

__all__ = ["Journal", "Ledger", "Line", "Note", "parse_line", "read_journal"]


class Note(Enum):
    """A line's meaning; of each pair one is written before the call and one after it returned."""

    PUT = "put"
    STORED = "stored"
    EXISTS = "exists"
    REFUSED = "refused"
    DELETE = "delete"
    DELETED = "deleted"
    LEASE = "lease"
    LEASED = "leased"
    FLUSH = "flush"
    FLUSHED = "flushed"
    READ_WRONG = "read wrong"
    RAISED = "raised"
    OPENED = "opened"
    CLOSED = "closed"


class Line(NamedTuple):
    """One note: about a numbered record and its generation, at ``time.monotonic`` seconds."""

    note: Note
    number: int = 0
    generation: int = 0
    size: int = 0
    text: str = ""
    at: float = 0.0


class Journal:
    """Appends lines to a file, each by one write: what is noted outlives the process, not the machine.

    Lines also go into the recorder's log, where one is loaded, between the calls that they were noted between.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, note: Note, number: int = 0, generation: int = 0, size: int = 0, text: str = "") -> None:
        """Note something, from any thread."""
        line = json.dumps([note.value, number, generation, size, text, time.monotonic()]).encode()
        os.write(self._descriptor, line + b"\n")
        mark(line)


def read_journal(path: Path) -> list[Line]:
    """Lines of a journal, without a last one that was cut off."""
    if not path.exists():
        return []
    return [parse_line(line) for line in path.read_bytes().split(b"\n")[:-1]]


def parse_line(line: bytes) -> Line:
    """A line as it was written."""
    note, *rest = json.loads(line)
    return Line(Note(note), *rest)


@dataclass(slots=True)
class Ledger:
    """What may be stored under each number, given the lines so far.

    Parameters
    ----------
    known : mapping of int to (int or None)
        Generation that each record had when the worker started; None or absent where there was none.

    Attributes
    ----------
    possible : dict of int to set
        Generations, or None for no record, that a crash at this moment may leave of a store that loses nothing.
    unsynced : dict of int to (int, float)
        Bytes and time of acknowledged records that no flush has covered.
    pinned : set of int
        Numbers that are leased, so that eviction is no excuse.
    problems : list of str
        What the worker itself saw go wrong.
    """

    known: Mapping[int, int | None] = field(default_factory=dict)
    possible: dict[int, set[int | None]] = field(init=False)
    unsynced: dict[int, tuple[int, float]] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    at: float = 0.0
    _flushing: dict[int, dict[int, tuple[int, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.possible = {number: {generation} for number, generation in self.known.items()}

    def read(self, lines: Iterable[Line]) -> Ledger:
        """Take lines, in order; this ledger."""
        for line in lines:
            self.take(line)
        return self

    def take(self, line: Line) -> None:
        """Take the next line."""
        self.at = line.at
        number, generation = line.number, line.generation
        may = self.possible.setdefault(number, {None})
        match line.note:
            case Note.PUT:
                may.add(generation)
            case Note.STORED:
                self.possible[number] = {generation}
                self.unsynced[number] = line.size, line.at
            case Note.EXISTS:
                may -= {None, generation}
            case Note.REFUSED:
                may.discard(generation)
            case Note.DELETE:
                may.add(None)
                self.pinned.discard(number)
            case Note.DELETED:
                self.possible[number] = {None}
                self.unsynced.pop(number, None)
            case Note.LEASED:
                self.pinned.add(number)
            case Note.FLUSH:
                self._flushing[number] = dict(self.unsynced)
            case Note.FLUSHED:
                self._flushed(number)
            case Note.CLOSED:
                self.unsynced.clear()
            case Note.READ_WRONG | Note.RAISED:
                self.problems.append(f"{line.note.value}: record {number}, {line.text}")
            case Note.LEASE | Note.OPENED:
                pass

    def _flushed(self, thread: int) -> None:
        for number, before in self._flushing.pop(thread, {}).items():
            if self.unsynced.get(number) == before:
                del self.unsynced[number]
