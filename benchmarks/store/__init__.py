"""The record store beside fio and other stores: speed, integrity, and what only kvtier is asked."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.peers import environments
from benchmarks.peers.environments import PEERS
from benchmarks.store import fio, host, integrity, scale, speed, tables
from benchmarks.store.competitors import starts
from benchmarks.store.settings import PARTS, Settings, settings_of
from kvtier.storage_backends.engines import PosixEngine

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "run", "show"]

_MEASURES: Final[Mapping[str, Callable[[Settings], dict[str, Any]]]] = {
    "speed": speed.measure,
    "integrity": integrity.measure,
    "host": host.measure,
    "scale": scale.measure,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where, with whom, how often."""
    parser.add_argument(
        "--directory",
        type=Path,
        help="a folder on the drive to be measured; a new one is made in it, and removed again",
    )
    parser.add_argument(
        "--peers",
        type=_names,
        help=f"which of {', '.join(PEERS)}, or none; all by default, none with --quick",
    )
    parser.add_argument("--install", action="store_true", help="make the environments of peers that have none")
    parser.add_argument("--parts", type=_parts, help=f"which of {', '.join(PARTS)}; all by default")
    parser.add_argument("--repeats", type=_positive, help="turns of every competitor")
    parser.add_argument("--records", type=_positive, help="records that are stored before the store is opened again")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every part in a new folder that is removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="kvtier-store-", dir=options.directory))
    try:
        settings = replace(settings_of(options, folder), direct=_takes_direct_io(folder))
        absent = _install(settings) if options.install else {}
        absent |= {name: start for name, start in starts(settings) if isinstance(start, str) and name not in absent}
        if (reason := fio.missing()) is not None:
            absent["fio"] = reason
        results = {part: _MEASURES[part](settings) for part in settings.parts}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"settings": _plain(settings), "fio": fio.version(), "absent": absent, "results": results}


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table with all competitors, one of kvtier's own, and who is missing."""
    for table in (tables.compared(result), tables.own(result)):
        if table is not None:
            console.print(table)
    for line in tables.footnotes(result):
        console.print(line)


def _takes_direct_io(folder: Path) -> bool:
    """What kvtier finds out for itself when it opens a file there: all competitors get the same."""
    with PosixEngine() as engine:
        file = engine.open(folder / "trial", writable=True, create=True)
        try:
            return file.direct
        finally:
            file.close()
            file.path.unlink()


def _install(settings: Settings) -> dict[str, str]:
    """Make environments; why those that could not be made were not."""
    problems = {}
    for name in settings.peers:
        print(f"environment of {name}", file=sys.stderr, flush=True)
        try:
            environments.install(PEERS[name])
        except environments.EnvironmentBuildError as error:
            problems[name] = f"cannot be installed: {error}"
    return problems


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings without the folder, which says nothing to others, and with the versions of the peers."""
    values = asdict(settings)
    del values["directory"]
    pinned = {name: PEERS[name].requirements.read_text(encoding="utf-8").splitlines() for name in settings.peers}
    values["pinned"] = {name: [line for line in lines if not line.startswith("#")] for name, lines in pinned.items()}
    return values


def _names(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PEERS)}, or none, got {', '.join(unknown)}")
    return names


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return parts


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
