"""``kvtier inspect``: what a store on disk holds, and for whom."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtier.cli.output import FINE, DebugFlag, JsonFlag, QuietFlag, Screen
from kvtier.types import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["inspect"]

_UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a segment or files tier.")],
    hottest: Annotated[int, typer.Option("--hottest", min=0, help="How many of the records read most are named.")] = 10,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say what a store on disk holds: tenants, namespaces, bytes, ages, what is read most.

    A segment directory must not be in use by another process.
    """
    with Screen(as_json=as_json, quiet=quiet, debug=debug) as screen:
        found = _look(directory, hottest, screen)
        if screen.as_json:
            screen.emit(found)
        else:
            screen.show(*_lines(directory, found), *_tables(found))
    raise typer.Exit(FINE)


def _look(directory: Path, hottest: int, screen: Screen) -> dict[str, Any]:
    """Everything that is known without reading payloads."""
    from kvtier.storage_backends.directories import open_existing

    with (
        screen.byte_progress("opening") as opening,
        open_existing(directory, read_only=True, progress=opening) as store,
    ):
        summary, stats = store.summary(hottest), store.stats()
        return {
            "kind": store.capabilities().name,
            "records": summary.records,
            "live_bytes": summary.live_bytes,
            "dead_bytes": stats.dead_bytes,
            "held_bytes": stats.held_bytes,
            "oldest": summary.oldest,
            "newest": summary.newest,
            "tenants": [_share(share) for share in summary.tenants],
            "namespaces": [_share(share) for share in summary.namespaces],
            "hottest": [
                {"key": record.key.hex(), "hits": record.hits, "live_bytes": record.live_bytes}
                for record in summary.hottest
            ],
        }


def _share(share: Any) -> dict[str, Any]:
    return {"name": share.name, "records": share.records, "live_bytes": share.live_bytes}


def _lines(directory: Path, found: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{format_bytes(found[f'{name}_bytes'])} {name}" for name in ("live", "dead", "held"))
    lines = [f"{directory}: {found['kind']}, {found['records']} records, {sizes}"]
    if found["records"]:
        lines.append(f"stored between {_ago(found['oldest'])} and {_ago(found['newest'])}")
    return lines


def _tables(found: dict[str, Any]) -> "list[Table]":
    titles = (("tenants", "tenant", "records"), ("namespaces", "namespace", "records"), ("hottest", "record", "hits"))
    return [_table(what, count, found[name]) for name, what, count in titles if found[name]]


def _table(what: str, count: str, rows: Sequence[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column(what, overflow="fold")
    table.add_column(count, justify="right")
    table.add_column("live", justify="right")
    for row in rows:
        table.add_row(row.get("name") or row["key"], str(row[count]), format_bytes(row["live_bytes"]))
    return table


def _ago(moment: float) -> str:
    """A moment in words, from now."""
    age = max(0.0, time.time() - moment)
    size, unit = next(((size, unit) for size, unit in _UNITS if age >= 2 * size), (1, "seconds"))
    return f"{age / size:.0f} {unit} ago"
