"""Tables of what was measured, for a person."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

__all__ = ["TABLES"]


def methods(measured: Mapping[str, Any]) -> Iterator[Table]:
    """Each method of one library below that of the other."""
    table = _table(
        "What stays of a prompt",
        (
            "method",
            "library",
            "prefill s",
            "vs kvpress",
            "decode ms",
            "vs kvpress",
            "KV MiB",
            "same tokens",
            "KL",
            "found",
        ),
    )
    rows = measured["rows"]
    peers = {row["method"]: row for row in rows if row["side"] == "kvpress"}
    for row in sorted(rows, key=lambda one: [other["method"] for other in rows].index(one["method"])):
        peer = peers.get(row["method"])
        table.add_row(
            row["method"],
            row["side"],
            f"{row['prefill_s']:.2f}",
            _ratio(row, peer, "prefill_s"),
            f"{row['decode_s'] * 1e3:.2f}",
            _ratio(row, peer, "decode_s"),
            f"{row['kv_bytes'] / 2**20:.2f}",
            f"{row['same_tokens']:.0%}",
            f"{row['divergence']:.2g}",
            f"{row['found']}/{row['needles']}",
        )
        if row["side"] == "kvpress":
            table.add_section()
    yield table


def planning(measured: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Shares of a decode step."""
    table = _table("Eviction at every step", ("policy", "keep", "step ms", "planning", "all of eviction"))
    for row in measured:
        table.add_row(
            row["name"],
            str(row["keep"]),
            f"{row['step_s'] * 1e3:.2f}",
            f"{row['planning']:.1%}",
            f"{row['eviction']:.1%}",
        )
    yield table


def statistics(measured: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """A chunk of a long prompt."""
    table = _table("A chunk in the middle of a long prompt", ("policy", "median s", "p10..p90 s", "over plain"))
    for row in measured:
        spread = f"{row['p10_s']:.2f}..{row['p90_s']:.2f}"
        table.add_row(row["name"], f"{row['median_s']:.2f}", spread, f"{row['over_plain']:+.0%}")
    yield table


TABLES: Final[Mapping[str, Callable[[Any], Iterator[Table]]]] = {
    "methods": methods,
    "planning": planning,
    "statistics": statistics,
}


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _ratio(row: Mapping[str, Any], peer: Mapping[str, Any] | None, key: str) -> str:
    return "" if peer is None or peer is row else f"{row[key] / peer[key]:.2f}x"
