"""``kvtier doctor``: what of kvtier works on this machine, and what to do about the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.output import FINE, FOUND_WRONG, DebugFlag, JsonFlag, Screen

if TYPE_CHECKING:
    from rich.table import Table

    from kvtier.cli.doctor_check import Check

__all__ = ["doctor"]

_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


def doctor(
    path: Annotated[Path, typer.Option("--path", help="Directory meant for the NVMe tier.")] = Path(),
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Check this machine, with a fix for each fault.

    PASS, WARN or FAIL a line; exit code 1 if anything fails.
    """
    with Screen(as_json=as_json, debug=debug) as screen:
        checks = _examine(path)
        failed = any(check.status == "FAIL" for check in checks)
        if screen.as_json:
            screen.emit({"ok": not failed, "checks": [check.to_dict() for check in checks]})
        else:
            screen.show(_table(checks))
    raise typer.Exit(FOUND_WRONG if failed else FINE)


def _examine(directory: Path) -> "list[Check]":
    """Every probe in turn; none can stop the others."""
    from kvtier.cli.doctor_check import run_probe
    from kvtier.cli.doctor_machine import MACHINE_PROBES
    from kvtier.cli.doctor_software import SOFTWARE_PROBES

    return [run_probe(probe, directory) for probe in (*SOFTWARE_PROBES, *MACHINE_PROBES)]


def _table(checks: "Sequence[Check]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="kvtier doctor", title_justify="left", show_edge=False)
    for column in ("check", "", "found", "fix"):
        table.add_column(column, overflow="fold")
    for check in checks:
        fix = check.fix if check.status != "PASS" else ""
        table.add_row(check.name, Text(check.status, _STYLES[check.status]), Text(check.detail), Text(fix))
    return table
