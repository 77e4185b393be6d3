"""The full sweep of faults over a store, as a script: ``python -m kvtier.testing.soak``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvtier.testing.crash.check import Promise
from kvtier.testing.crash.corruption import corrupt_again_and_again
from kvtier.testing.crash.kills import Subject, kill_again_and_again
from kvtier.testing.crash.load import Load
from kvtier.testing.crash.losses import lose_power_again_and_again
from kvtier.testing.segment_stores import RELAXED_LOSS_BYTES, RELAXED_LOSS_SECONDS

__all__ = ["Sweep", "app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SEGMENTS = "kvtier.testing.segment_stores:"
_FILLER = 128 << 10
_SMALL = 4 << 20


@dataclass(slots=True)
class Sweep:
    """What one kind of fault did to one store.

    Attributes
    ----------
    faults : int
        Kills, simulated power losses or corruptions.
    places : dict of str to int
        Kills by failpoint.
    lost_bytes : int
        Most acknowledged bytes that one crash took; above 0 only where the store announces it.
    lost_records, counted : int
        Of corruptions: records that were missing, and damage that the store counted.
    problems : list of str
        Broken promises; empty when all is well.
    """

    store: str
    kind: str
    faults: int = 0
    seconds: float = 0.0
    places: dict[str, int] = field(default_factory=dict)
    lost_bytes: int = 0
    lost_records: int = 0
    counted: int = 0
    problems: list[str] = field(default_factory=list)


def subjects(store: str) -> dict[str, Subject]:
    """What to sweep: segment stores in both modes, roomy and full; or the named store, which must be durable."""
    promises = {"durable": Promise()}
    if not store:
        promises["relaxed"] = Promise(lost_bytes=RELAXED_LOSS_BYTES, lost_seconds=RELAXED_LOSS_SECONDS)
    found: dict[str, Subject] = {}
    for mode, promise in promises.items():
        roomy = Subject(target=store or f"{_SEGMENTS}{mode}", promise=promise)
        found[mode] = roomy
        found[f"{mode}, evicting"] = replace(
            roomy, capacity_bytes=_SMALL, promise=replace(promise, evicts=True), load=Load(filler=_FILLER)
        )
    return found


@app.command()
def soak(
    store: Annotated[str, typer.Option(help="Opening function, 'module:name' or 'file.py:name'; none: segments.")] = "",
    kills: Annotated[int, typer.Option(help="SIGKILLs, half of them at named failpoints.")] = 1000,
    power_losses: Annotated[int, typer.Option(help="Power losses on the simulated block device.")] = 1000,
    corruptions: Annotated[int, typer.Option(help="Random corruptions of the files.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    directory: Annotated[Path | None, typer.Option(help="Where to work; a temporary directory if not given.")] = None,
    evidence: Annotated[Path | None, typer.Option(help="Keep directories that broke a promise here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Kill, cut the power of and corrupt record stores; exit code 1 when a promise was broken."""
    console = Console(stderr=True)
    sweeps: list[Sweep] = []
    wanted = {"kills": kills, "power losses": power_losses, "corruptions": corruptions}
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvtier-soak-") as name, _bars(console) as progress:
        for kind, count in wanted.items():
            # Corruption starts from one state; whether the load before it evicted makes no difference.
            chosen = {
                label: one for label, one in subjects(store).items() if kind != "corruptions" or not one.load.filler
            }
            for label, subject in chosen.items():
                sweeps.append(sweep := Sweep(label, kind))
                scratch = Path(name) / f"{len(sweeps)}"
                scratch.mkdir()
                share = -(-count // len(chosen))
                task = progress.add_task(_line(sweep), total=share)
                for _ in _run(sweep, subject, scratch, share, seed, evidence):
                    progress.update(task, completed=sweep.faults, description=_line(sweep))
    problems = sum(len(sweep.problems) for sweep in sweeps)
    for sweep in sweeps:
        for problem in sweep.problems[:20]:
            console.print(f"{sweep.store}: {problem}", style="red", highlight=False, markup=False)
    if as_json:
        sys.stdout.write(json.dumps({"seed": seed, "problems": problems, "sweeps": list(map(asdict, sweeps))}) + "\n")
    raise typer.Exit(1 if problems else 0)


def _run(sweep: Sweep, subject: Subject, scratch: Path, count: int, seed: int, evidence: Path | None) -> Iterator[None]:
    """Do one sweep, a fault at a time."""
    start = time.monotonic()
    faults: Iterable[tuple[str, tuple[str, ...]]] = ()
    match sweep.kind:
        case "kills":
            faults = _kills(sweep, subject, scratch, count, seed, evidence)
        case "power losses":
            faults = _losses(sweep, subject, scratch, count, seed, evidence)
        case _:
            faults = _corruptions(sweep, subject, scratch, count, seed, evidence)
    for words, problems in faults:
        sweep.faults += 1
        sweep.seconds = time.monotonic() - start
        sweep.problems += [f"{words}: {problem}" for problem in problems]
        yield


def _kills(
    sweep: Sweep, subject: Subject, scratch: Path, count: int, seed: int, evidence: Path | None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for turn, kill in enumerate(kill_again_and_again(subject, scratch, count, seed, evidence=evidence)):
        sweep.places[kill.where] = sweep.places.get(kill.where, 0) + 1
        sweep.lost_bytes = max(sweep.lost_bytes, kill.findings.lost_bytes)
        yield f"kill {turn} at {kill.where}", kill.findings.problems


def _losses(
    sweep: Sweep, subject: Subject, scratch: Path, count: int, seed: int, evidence: Path | None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for turn, loss in enumerate(lose_power_again_and_again(subject, scratch, count, seed, evidence=evidence)):
        sweep.lost_bytes = max(sweep.lost_bytes, loss.findings.lost_bytes)
        yield f"power loss {turn} after event {loss.event} of {loss.events}", loss.findings.problems


def _corruptions(
    sweep: Sweep, subject: Subject, scratch: Path, count: int, seed: int, evidence: Path | None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for turn, one in enumerate(corrupt_again_and_again(subject, scratch, count, seed, evidence=evidence)):
        sweep.lost_records += one.lost
        sweep.counted += one.counted
        yield f"corruption {turn}, {one.words}", one.problems


def _line(sweep: Sweep) -> str:
    broken = f", {len(sweep.problems)} PROBLEMS" if sweep.problems else ""
    return f"{sweep.store}: {sweep.kind}{broken}"


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


if __name__ == "__main__":
    app()
