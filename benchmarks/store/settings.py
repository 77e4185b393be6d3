"""What is stored, in what calls, how often: the measurement proper, and the quick one that only shows that it runs."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.peers.client import Calls, Pieces
from benchmarks.peers.environments import PEERS

__all__ = ["PARTS", "Settings", "Visit", "settings_of"]

PARTS: Final = ("speed", "integrity", "host", "scale")
KIB: Final = 1 << 10
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What every competitor does in one turn: fill an empty directory, then perhaps read it.

    Parameters
    ----------
    name : str
        Of its rows.
    pieces : Pieces
    per_call : int
        Pieces in a call of the store.
    durable : bool
        A call that stores returns when its pieces survive a loss of power.
    reads : tuple of str
        ``"read"``: all pieces in the order they were stored, in the same calls; ``"randread"``: all pieces in an order
        drawn by chance, so that neighbours are not asked for together.
    """

    name: str
    pieces: Pieces
    per_call: int
    durable: bool
    reads: tuple[str, ...] = ()

    @property
    def writes(self) -> Calls:
        """All pieces in order."""
        return _calls(range(self.pieces.count), self.per_call)

    def calls(self, kind: str) -> Calls:
        """The calls of one kind of read."""
        if kind == "read":
            return self.writes
        order = list(range(self.pieces.count))
        random.Random(0).shuffle(order)  # noqa: S311 - an order, not a secret
        return _calls(order, self.per_call)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run.

    Parameters
    ----------
    directory : Path
        Where data is written, and removed again.
    direct : bool
        Every competitor bypasses the page cache; or none, where the drive's file system does not let it.
    peers : tuple of str
        Peers asked for, by name.
    repeats : int
        Turns of every competitor at every visit.
    visits : tuple of Visit
    killed_pieces : int
        Stored before a SIGKILL.
    records, record_bytes : int
        Stored before the store is opened again and looked into, and payload of each.
    rebuild : Pieces
        Stored before the index is thrown away.
    host : Pieces
        Loaded from host memory, beside copying as much.
    """

    parts: tuple[str, ...]
    directory: Path
    direct: bool
    peers: tuple[str, ...]
    repeats: int
    visits: tuple[Visit, ...]
    killed_pieces: int = 64
    records: int
    record_bytes: int = 4 * KIB
    rebuild: Pieces
    host: Pieces


def settings_of(options: argparse.Namespace, directory: Path) -> Settings:
    """The settings that the command line asks for."""
    chosen = _quick(directory) if options.quick else _proper(directory)
    for name in ("parts", "peers", "repeats", "records"):
        if getattr(options, name) is not None:
            chosen = replace(chosen, **{name: getattr(options, name)})
    return chosen


def _proper(directory: Path) -> Settings:
    return Settings(
        parts=PARTS,
        directory=directory,
        direct=True,
        peers=tuple(PEERS),
        repeats=5,
        visits=_visits(small=32 * MIB, large=128 * MIB, sizes=(64 * KIB, MIB, 4 * MIB, 16 * MIB)),
        records=1_000_000,
        rebuild=Pieces(count=1024, nbytes=MIB),
        host=Pieces(count=256, nbytes=MIB),
    )


def _quick(directory: Path) -> Settings:
    return Settings(
        parts=PARTS,
        directory=directory,
        direct=True,
        peers=(),
        repeats=1,
        visits=_visits(small=4 * MIB, large=4 * MIB, sizes=(64 * KIB,)),
        killed_pieces=8,
        records=2_000,
        rebuild=Pieces(count=16, nbytes=MIB),
        host=Pieces(count=8, nbytes=MIB),
    )


def _visits(*, small: int, large: int, sizes: Sequence[int]) -> tuple[Visit, ...]:
    visits = []
    for durable in (True, False):
        for size in sizes:
            total = small if size < MIB else large
            visits.append(
                Visit(
                    name=_size(size),
                    pieces=Pieces(count=total // size, nbytes=size),
                    # As many as fio's deepest queue, in 64 MiB at most.
                    per_call=min(16, 64 * MIB // size),
                    durable=durable,
                    reads=_reads(size) if durable else (),
                )
            )
        request = Pieces(count=small // (64 * KIB), nbytes=64 * KIB)
        reads = _reads(64 * KIB) if durable else ()
        visits.append(Visit(name="64 x 64 KiB", pieces=request, per_call=64, durable=durable, reads=reads))
    return tuple(visits)


def _reads(size: int) -> tuple[str, ...]:
    return ("read", "randread") if size < MIB else ("read",)


def _size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def _calls(order: Sequence[int], per_call: int) -> Calls:
    return [list(order[at : at + per_call]) for at in range(0, len(order), per_call)]
