"""The result as tables: one a part, a section a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

__all__ = ["TABLES"]

_SHOWN: Final = 10

Cases = Sequence[Mapping[str, Any]]


def _attention(cases: Cases) -> Table:
    table = _table(
        "Attention of one layer, one token",
        (
            "context",
            "dtype",
            "what",
            "median ms",
            "p10..p90 ms",
            "MiB read",
            "GB/s",
            "of read",
            "vs stock",
            "vs sdpa",
            "vs grouped",
        ),
    )
    for case in cases:
        for row in _rows(case, table):
            ratios = [_ratio(row.get(key)) for key in ("vs_stock", "vs_sdpa", "vs_grouped")]
            table.add_row(
                *_case(case),
                row["name"],
                *_times(row),
                _mib(row),
                f"{row['gb_per_s']:.1f}",
                f"{row['of_read_bandwidth']:.0%}",
                *ratios,
            )
        table.add_section()
    return table


def _step(cases: Cases) -> Table:
    table = _table(
        "A whole decode step",
        (
            "context",
            "dtype",
            "layers",
            "what",
            "median ms",
            "p10..p90 ms",
            "MiB of KV",
            "GB/s with weights",
            "vs stock",
        ),
    )
    for case in cases:
        for row in _rows(case, table):
            table.add_row(
                *_case(case),
                str(case["layers"]),
                row["name"],
                *_times(row),
                _mib(row),
                f"{row['gb_per_s']:.1f}",
                _ratio(row["vs_stock"]),
            )
        table.add_section()
    return table


def _overhead(cases: Cases) -> Table:
    table = _table(
        "Session overhead, per layer and step",
        (
            "context",
            "dtype",
            "what",
            "generated",
            "session us",
            "kernels us",
            "difference us",
            "overhead us",
            "mean us",
            "p10..p90 us",
            "target us",
        ),
    )
    for case in cases:
        for row in _rows(case, table):
            table.add_row(
                *_case(case),
                row["name"],
                str(row["generated"]),
                f"{row['session_us']:.0f}",
                f"{row['kernels_us']:.0f}",
                f"{row['overhead_by_difference_us']:.0f}",
                f"{row['overhead_us']:.0f}",
                f"{row['overhead_mean_us']:.0f}",
                f"{row['overhead_p10_us']:.0f}..{row['overhead_p90_us']:.0f}",
                f"{case['target_us']:.0f}",
            )
        table.add_section()
    return table


def _profiles(cases: Cases) -> list[Table]:
    """Where the time of each policy's session goes, at the most generated tokens; the JSON has all of them."""
    tables = []
    for case in cases:
        latest = {row["name"]: row for row in case.get("rows", ())}
        for name, row in latest.items():
            title = (
                f"{name}, {case['dtype']}, {row['generated']} generated: the session's own functions, a layer and step"
            )
            table = _table(title, ("function", "calls", "us"))
            for entry in row["profile"][:_SHOWN]:
                table.add_row(entry["function"], f"{entry['calls']:.1f}", f"{entry['own_us']:.1f}")
            tables.append(table)
    return tables


TABLES: Final[Mapping[str, Callable[[Cases], Sequence[Table]]]] = {
    "attention": lambda cases: [_attention(cases)],
    "step": lambda cases: [_step(cases)],
    "overhead": lambda cases: [_overhead(cases), *_profiles(cases)],
}


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("dtype", "what", "function") else "right", overflow="fold")
    return table


def _rows(case: Mapping[str, Any], table: Table) -> Sequence[Mapping[str, Any]]:
    """The rows of a case; none, and a line that says why, when it was left out."""
    if "skipped" in case:
        table.add_row(*_case(case), f"left out: {case['skipped']}")
        return ()
    rows: Sequence[Mapping[str, Any]] = case["rows"]
    return rows


def _case(case: Mapping[str, Any]) -> tuple[str, str]:
    return f"{case['context'] // 1024}K", case["dtype"]


def _times(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['median_s'] * 1e3:.2f}", f"{row['p10_s'] * 1e3:.2f}..{row['p90_s'] * 1e3:.2f}"


def _mib(row: Mapping[str, Any]) -> str:
    return f"{(row['kv_bytes'] + row.get('sketch_bytes', 0)) / 2**20:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
