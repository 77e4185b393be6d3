"""What a store returns for a flipped bit and a cut file, and what is left of it after SIGKILL."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.client import Answer, Client, Pieces
from benchmarks.peers.process import PeerError
from benchmarks.store.competitors import starts
from benchmarks.store.settings import KIB, Settings

__all__ = ["PROBES", "measure"]

_DAMAGED: Final = 5
_AT_REST: Final = Pieces(count=16, nbytes=64 * KIB)

Start = tuple[list[str], Mapping[str, str], Mapping[str, object]]


class Trial:
    """One store under all probes, each in a new directory; one process writes, another reads.

    Parameters
    ----------
    start
        What starts a process of the store.
    """

    def __init__(self, start: Start, settings: Settings) -> None:
        self._start = start
        self._directory = settings.directory / "probe"
        self._direct = settings.direct
        self._killed = Pieces(count=settings.killed_pieces, nbytes=64 * KIB)
        self._processes: dict[str, Client] = {}

    def flipped(self) -> str:
        """Turn one bit in the middle of a stored piece, read it, and once more after the store was opened again."""
        with self._stored(_AT_REST, durable=True) as writer:
            _flip(*_find(self._directory, writer.sample(_DAMAGED)))
            first = _told(writer.get(_one_by_one(_AT_REST)))
            writer.close_store()
            second = self._read(_AT_REST, durable=True)
            later = second if isinstance(second, str) else _told(second)
            return first if later == first else f"{first}; opened again: {later}"

    def truncated(self) -> str:
        """Close, cut the file in the middle of a piece, open, read."""
        with self._stored(_AT_REST, durable=True) as writer:
            sample = writer.sample(_DAMAGED)
            writer.close_store()
            _cut(*_find(self._directory, sample))
            answer = self._read(_AT_REST, durable=True)
            return answer if isinstance(answer, str) else _told(answer)

    def killed_durable(self) -> str:
        """SIGKILL after the last durable store was acknowledged, open, read."""
        return self._killed_after(durable=True)

    def killed_relaxed(self) -> str:
        """SIGKILL after the last relaxed store was acknowledged, open, read."""
        return self._killed_after(durable=False)

    def close(self) -> None:
        """End the processes."""
        for name in list(self._processes):
            self._end(name)

    def _killed_after(self, *, durable: bool) -> str:
        with self._stored(self._killed, durable=durable):
            self._end("writer")
            answer = self._read(self._killed, durable=durable)
            if isinstance(answer, str):
                return answer
            wrong = f", {len(answer.wrong)} wrong" if answer.wrong else ""
            return f"{len(answer.right)} of {self._killed.count} left{wrong}"

    @contextmanager
    def _stored(self, pieces: Pieces, *, durable: bool) -> Iterator[Client]:
        """A store with all pieces acknowledged, in four calls; afterwards nothing of it."""
        writer = self._process("writer")
        try:
            writer.open(self._directory, pieces, direct=self._direct, durable=durable)
            share = pieces.count // 4
            writer.put([list(range(first, first + share)) for first in range(0, pieces.count, share)])
            yield writer
        except PeerError:
            self.close()
            raise
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _read(self, pieces: Pieces, *, durable: bool) -> Answer | str:
        """Open in the other process and read piece by piece; in words when it cannot be opened or read."""
        reader = self._process("reader")
        try:
            reader.open(self._directory, pieces, direct=self._direct, durable=durable)
            answer = reader.get(_one_by_one(pieces))
            reader.close_store()
        except PeerError as error:
            self._end("reader")
            return f"raises: {error}"
        return answer

    def _process(self, name: str) -> Client:
        if name not in self._processes:
            self._processes[name] = Client(*self._start)
        return self._processes[name]

    def _end(self, name: str) -> None:
        self._processes.pop(name).kill()


PROBES: Final[Mapping[str, Callable[[Trial], str]]] = {
    "one bit flipped at rest": Trial.flipped,
    "file cut at rest": Trial.truncated,
    "SIGKILL after durable puts": Trial.killed_durable,
    "SIGKILL after relaxed puts": Trial.killed_relaxed,
}


def measure(settings: Settings) -> dict[str, Any]:
    """What every store did, by probe and store, in words."""
    found: dict[str, dict[str, str]] = {probe: {} for probe in PROBES}
    for name, start in starts(settings):
        if isinstance(start, str):
            continue
        print(f"integrity: {name}", file=sys.stderr, flush=True)
        trial = Trial(start, settings)
        try:
            for probe, tried in PROBES.items():
                found[probe][name] = _tried(trial, tried)
        finally:
            trial.close()
    return {"pieces_at_rest": _AT_REST.count, "probes": found}


def _tried(trial: Trial, probe: Callable[[Trial], str]) -> str:
    try:
        return probe(trial)
    except PeerError as error:
        return f"not tried: {error}"


def _one_by_one(pieces: Pieces) -> list[list[int]]:
    return [[index] for index in range(pieces.count)]


def _told(answer: Answer) -> str:
    """What became of the damaged piece, and of the others where they suffered too."""
    others = _AT_REST.count - 1 - len([index for index in answer.right if index != _DAMAGED])
    more = f"; {others} others lost" if others else ""
    if _DAMAGED in answer.wrong:
        return "wrong bytes, as a hit" + more
    return ("unharmed" if _DAMAGED in answer.right else "a miss") + more


def _find(directory: Path, sample: bytes) -> tuple[Path, int]:
    """The file that holds these bytes, and where."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.stat().st_size >= len(sample):
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                place = content.find(sample)
                if place >= 0:
                    return path, place
    raise PeerError("the piece is in no file as it was given")


def _flip(path: Path, place: int) -> None:
    """Turn one bit, and let nothing of the file stay in the page cache."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cut(path: Path, place: int) -> None:
    os.truncate(path, place)
