"""The result as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

__all__ = ["table"]


def table(result: Mapping[str, Any]) -> Table:
    """A section a case."""
    base = "read" if result["settings"]["device"] == "cpu" else "copy"
    made = Table(title=f"Kernels on {result['device']}", title_justify="left")
    numbers = ("median us", "p10..p90 us", "MiB read", "GB/s", f"of {base}", "target")
    for name in ("context", "dtype", "what", "by", *numbers):
        made.add_column(name, justify="left" if name in ("dtype", "what", "by") else "right", overflow="fold")
    for case in result["results"]:
        which = (f"{case['context'] // 1024}K", case["dtype"])
        if "skipped" in case:
            made.add_row(*which, f"left out: {case['skipped']}")
        for row in case.get("rows", ()):
            made.add_row(
                *which,
                row["name"],
                row.get("implementation", ""),
                f"{row['median_s'] * 1e6:.0f}",
                f"{row['p10_s'] * 1e6:.0f}..{row['p90_s'] * 1e6:.0f}",
                f"{row['bytes_read'] / 2**20:.2f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['of_bandwidth']:.0%}",
                "" if row.get("target") is None else f"{row['target']:.0%}",
            )
        made.add_section()
    return made
