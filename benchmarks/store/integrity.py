"""What a store returns for a flipped byte and a cut file, and what is left of it after SIGKILL: tried, not read about."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.client import Answer, Client, PeerError, Pieces
from benchmarks.store.competitors import starts
from benchmarks.store.settings import KIB, Settings

__all__ = ["PROBES", "measure"]

_DAMAGED: Final = 5
_AT_REST: Final = Pieces(count=16, nbytes=64 * KIB)

Start = tuple[list[str], Mapping[str, str], Mapping[str, object]]


class Trial:
    """One store under all probes, each in a new directory, each half in a process of its own."""

    def __init__(self, start: Start, settings: Settings) -> None:
        self._start = start
        self._directory = settings.directory / "probe"
        self._direct = settings.direct
        self._killed = Pieces(count=settings.killed_pieces, nbytes=64 * KIB)

    def flipped(self) -> str:
        """Close, turn one bit in the middle of a piece, open, read."""
        return self._at_rest(_flip)

    def truncated(self) -> str:
        """Close, cut the file in the middle of a piece, open, read."""
        return self._at_rest(_cut)

    def killed_durable(self) -> str:
        """SIGKILL after the last durable store was acknowledged, open, read."""
        return self._killed_after(durable=True)

    def killed_relaxed(self) -> str:
        """SIGKILL after the last relaxed store was acknowledged, open, read."""
        return self._killed_after(durable=False)

    def _at_rest(self, damage: Callable[[Path, int], None]) -> str:
        with self._new_directory():
            with self._opened(_AT_REST, durable=True) as client:
                client.put([list(range(_AT_REST.count))])
                sample = client.sample(_DAMAGED)
                client.close_store()
            damage(*_find(self._directory, sample))
            answer = self._read(_AT_REST, durable=True)
            return answer if isinstance(answer, str) else _told(answer)

    def _killed_after(self, *, durable: bool) -> str:
        with self._new_directory():
            with self._opened(self._killed, durable=durable) as client:
                client.put([[index] for index in range(self._killed.count)])
                client.kill()
            answer = self._read(self._killed, durable=durable)
            if isinstance(answer, str):
                return answer
            wrong = f", {len(answer.wrong)} wrong" if answer.wrong else ""
            return f"{len(answer.right)} of {self._killed.count} left{wrong}"

    def _read(self, pieces: Pieces, *, durable: bool) -> Answer | str:
        """Open again and read piece by piece; in words when it cannot be opened or read."""
        try:
            with self._opened(pieces, durable=durable) as client:
                return client.get([[index] for index in range(pieces.count)])
        except PeerError as error:
            return f"raises: {error}"

    @contextmanager
    def _opened(self, pieces: Pieces, *, durable: bool) -> Iterator[Client]:
        with Client(*self._start) as client:
            client.open(self._directory, pieces, direct=self._direct, durable=durable)
            yield client

    @contextmanager
    def _new_directory(self) -> Iterator[None]:
        try:
            yield
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)


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
        for probe, tried in PROBES.items():
            try:
                found[probe][name] = tried(trial)
            except PeerError as error:
                found[probe][name] = f"not tried: {error}"
    return {"pieces_at_rest": _AT_REST.count, "probes": found}


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
