"""``kvtier verify``: every digest of a store on disk checked, and what is wrong put aside if so asked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtier.cli.output import FINE, FOUND_WRONG, DebugFlag, JsonFlag, QuietFlag, Screen
from kvtier.types import format_bytes

if TYPE_CHECKING:
    from kvtier.storage_backends.directories import StoredRecords
    from kvtier.storage_backends.segment import VerifyReport

__all__ = ["verify"]

_SHOWN = 20  # damaged records that are listed one by one


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a segment or files tier.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Put aside or mend what is damaged, rebuild the index.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Check every byte of a store on disk.

    Exit code 1 if anything is wrong, repaired or not; 2 if it cannot be checked. A segment directory must not be in use
    by another process; without --repair nothing is written.
    """
    with Screen(as_json=as_json, quiet=quiet, debug=debug) as screen:
        kind, report, problem = _check(directory, repair=repair, screen=screen)
        repaired = repair and not problem
        if screen.as_json:
            screen.emit(_value(kind, report, repaired=repaired))
        else:
            screen.show(*_lines(directory, report, repaired=repaired))
        if problem:
            screen.warn(f"not repaired: {problem}")
    raise typer.Exit(FINE if report.clean and not problem else FOUND_WRONG)


def _check(directory: Path, *, repair: bool, screen: Screen) -> "tuple[str, VerifyReport, str]":
    """Open, read everything, and leave behind what was asked for, or say why that cannot be."""
    from kvtier.storage_backends.directories import open_existing

    with screen.byte_progress("opening") as opening:
        store = open_existing(directory, read_only=not repair, progress=opening)
    with store:
        with screen.byte_progress("verifying") as verifying:
            report = store.verify(verifying)
        return store.capabilities().name, report, _rebuild(store) if repair else ""


def _rebuild(store: "StoredRecords") -> str:
    """Write the index anew, where there is one; why it could not be written."""
    from kvtier.storage_backends.segment import SegmentRecords

    if isinstance(store, SegmentRecords):
        store.rewrite_index()
    return store.stats().degraded


def _value(kind: str, report: "VerifyReport", *, repaired: bool) -> dict[str, Any]:
    """The report as JSON; ``damaged`` names records by key, and segments by file, of which nothing can be read."""
    return {
        "kind": kind,
        "records": report.records,
        "bytes": report.checked_bytes,
        "damaged": [*(key.hex() for key in report.damaged), *report.lost_segments, *report.restored_segments],
        "lost_segments": list(report.lost_segments),
        "failed": [key.hex() for key in report.failed],
        "torn": report.torn,
        "index_rebuilt": report.rebuilt,
        "repaired": repaired,
        "seconds": round(report.seconds, 3),
        "bytes_per_second": round(_speed(report)),
    }


def _lines(directory: Path, report: "VerifyReport", *, repaired: bool) -> list[str]:
    """The report for a person."""
    checked = f"{report.records} records, {format_bytes(report.checked_bytes)}"
    lines = [f"{directory}: {checked} checked in {report.seconds:.1f} s, {format_bytes(round(_speed(report)))}/s"]
    wrong = [(key.hex(), "damaged") for key in report.damaged]
    wrong += [(name, "it cannot be told what it holds; none of it is served") for name in report.lost_segments]
    wrong += [(name, "a superblock is damaged, nothing of it is lost") for name in report.restored_segments]
    wrong += [(key.hex(), "cannot be read") for key in report.failed]
    lines += [f"  {what}: {reason}" for what, reason in wrong[:_SHOWN]]
    if len(wrong) > _SHOWN:
        lines.append(f"  and {len(wrong) - _SHOWN} more; --json names them all")
    if report.torn:
        what = "1 record is" if report.torn == 1 else f"{report.torn} records are"
        lines.append(f"  {what} not whole: cut off by a crash, or damaged while the index did not know of it")
    if report.rebuilt:
        lines.append("  the index was missing or damaged, and " + ("was" if repaired else "can be") + " written anew")
    if not wrong:
        return [*lines, "nothing is wrong"]
    return [*lines, f"{len(wrong)} wrong" + (", put aside or mended" if repaired else "; --repair puts aside or mends")]


def _speed(report: "VerifyReport") -> float:
    return report.checked_bytes / report.seconds if report.seconds > 0 else 0.0
