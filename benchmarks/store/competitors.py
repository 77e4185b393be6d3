"""Whoever takes turns at a visit: kvtier, a peer in its own process, or fio at one of its settings."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from benchmarks.peers import environments
from benchmarks.peers.client import Client
from benchmarks.peers.process import PeerError
from benchmarks.store import fio
from benchmarks.store.settings import Settings, Visit

__all__ = ["KVTIER", "Competitor", "FioAt", "Served", "fios", "forget", "served", "starts"]

KVTIER: Final = "kvtier"


class Competitor(Protocol):
    """Takes its turn at a visit."""

    @property
    def label(self) -> str:
        """Name of it, and of nobody else."""

    def takes(self, visit: Visit, turn: int) -> bool:
        """Whether it takes part in this round of a visit."""

    def visit(self, visit: Visit) -> Mapping[str, float]:
        """Bytes a second of ``"write"`` and of each read of the visit.

        Raises
        ------
        PeerError, FioError
            When it cannot.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class FioAt:
    """fio at one setting."""

    label: str
    setting: fio.Setting
    directory: Path
    direct: bool

    def takes(self, visit: Visit, turn: int) -> bool:
        """Always."""
        del visit, turn
        return True

    def visit(self, visit: Visit) -> Mapping[str, float]:
        """New files, written and read."""
        load = fio.Load(
            piece_bytes=visit.pieces.nbytes,
            total_bytes=visit.pieces.count * visit.pieces.nbytes,
            sync_every=visit.per_call if visit.durable else None,
            then=visit.reads,
        )
        return fio.run(load, self.setting, self.directory, direct=self.direct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A store in a process of its own: kvtier too."""

    label: str
    client: Client
    directory: Path
    direct: bool
    slow_start: bool

    def takes(self, visit: Visit, turn: int) -> bool:
        """Always, but for one that is slow to start."""
        return not self.slow_start or (turn == 0 and bool(visit.reads))

    def visit(self, visit: Visit) -> Mapping[str, float]:
        """A new store, filled and read; what comes back wrong or not at all is an error here."""
        try:
            opened = self.client.open(self.directory, visit.pieces, direct=self.direct, durable=visit.durable)
            rates = {}
            if not opened.untimed_put:
                rates["write"] = self._rate(visit, self.client.put(visit.writes))
            elif visit.reads:
                self.client.put([list(range(visit.pieces.count))])
            for kind in visit.reads:
                forget(self.directory)
                answer = self.client.get(visit.calls(kind))
                if len(answer.right) < visit.pieces.count:
                    raise PeerError(f"{len(answer.wrong)} pieces came back wrong, {len(answer.missing)} not at all")
                rates[kind] = self._rate(visit, answer.seconds)
            self.client.close_store()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)
        return rates

    def _rate(self, visit: Visit, seconds: tuple[float, ...]) -> float:
        return visit.pieces.count * visit.pieces.nbytes / sum(seconds)


def fios(settings: Settings) -> list[FioAt]:
    """Every setting of fio."""
    return [
        FioAt(label=one.label, setting=one, directory=settings.directory / "fio", direct=settings.direct)
        for one in fio.SETTINGS
    ]


def starts(settings: Settings) -> Iterator[tuple[str, tuple[list[str], dict[str, str], Mapping[str, object]] | str]]:
    """Each store by name, and how its process is started, or why it cannot be."""
    runner = environments.HERE / "kvtier_records" / "runner.py"
    yield KVTIER, (environments.serving(sys.executable, runner), {}, {})
    for name in settings.peers:
        peer = environments.PEERS[name]
        reason = environments.installed(peer)
        yield name, reason if reason is not None else (*environments.command(peer), peer.options)


def served(settings: Settings, stack: ExitStack) -> list[Served]:
    """Every store that can be started, until the stack ends."""
    return [
        Served(
            label=name,
            client=stack.enter_context(Client(*start)),
            directory=settings.directory / name,
            direct=settings.direct,
            slow_start=name in environments.PEERS and environments.PEERS[name].slow_start,
        )
        for name, start in starts(settings)
        if not isinstance(start, str)
    ]


def forget(directory: Path) -> None:
    """Drop the directory's files from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
