"""The result as tables: one with every competitor, one of questions that only kvtier is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from benchmarks.peers.environments import PEERS
from benchmarks.store.competitors import KVTIER
from kvtier.types import format_bytes

__all__ = ["compared", "footnotes", "own"]

_WORDS: Final = {"write": "write", "read": "read", "randread": "random read"}


def compared(result: Mapping[str, Any]) -> Table | None:
    """Reads, writes and probes of all competitors; None when neither was measured."""
    speed, integrity = result["results"].get("speed"), result["results"].get("integrity")
    if speed is None and integrity is None:
        return None
    peers = [name for name in result["settings"]["peers"] if name not in _absent(result)]
    stores = [KVTIER, *peers]
    way = "direct I/O" if result["settings"]["direct"] else "through the page cache"
    table = Table(title=f"GB/s, {way}: median, and half the way from the least to the most round", title_justify="left")
    for name in ("", "fio, best of its settings", *(_label(name) for name in stores), "vs fio", "vs best peer"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in speed["rows"] if speed else ():
        table.add_row(*_speed_cells(row, stores))
    table.add_section()
    for probe, found in integrity["probes"].items() if integrity else ():
        table.add_row(probe, "", *(found.get(name, "") for name in stores), "", "")
    return table


def own(result: Mapping[str, Any]) -> Table | None:
    """Host tier, look-ups, memory, opening; None when none was measured."""
    lines = [*_host_lines(result["results"].get("host")), *_scale_lines(result["results"].get("scale"))]
    if not lines:
        return None
    table = Table(title="kvtier by itself", title_justify="left")
    for name in ("", "measured", "target"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def footnotes(result: Mapping[str, Any]) -> Iterator[str]:
    """Who is not in the table, and why."""
    for name, reason in _absent(result).items():
        yield f"left out: {_label(name)}: {reason}"
    for name, reason in result["results"].get("speed", {}).get("failed", {}).items():
        yield f"failed: {_label(name)}: {reason}"


def _absent(result: Mapping[str, Any]) -> Mapping[str, str]:
    found: Mapping[str, str] = result["absent"]
    return found


def _speed_cells(row: Mapping[str, Any], stores: Sequence[str]) -> list[str]:
    measured = row["competitors"]
    best = row["fio_best"]
    return [
        f"{row['name']} {_WORDS[row['what']]}",
        f"{_rates(measured[best])}\n{best}" if best else "",
        *(_rates(measured[name]) if name in measured else "" for name in stores),
        _ratio(row["vs_fio"]),
        _ratio(row["vs_peer"]),
    ]


def _host_lines(host: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    if host is None:
        return
    for row in host["rows"]:
        yield f"{row['name']}, records of {format_bytes(host['record_bytes'])}", f"{row['gb_per_s']:.1f} GB/s", ""
    yield "host tier of memcpy, records", _ratio(host["vs_memcpy"]), "0.7x"
    yield "host tier of memcpy, chunks into place", _ratio(host["typed_vs_memcpy"]), "0.7x"


def _scale_lines(scale: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    if scale is None:
        return
    count, batch = f"{scale['records']:,}", f"{scale['lookup_batch']:,}"
    yield (
        f"look-up among {count}, batches of {batch}, present",
        f"{scale['lookup_us_a_key_present']:.2f} us a key",
        "3 us",
    )
    yield (
        f"look-up among {count}, batches of {batch}, absent",
        f"{scale['lookup_us_a_key_absent']:.2f} us a key",
        "3 us",
    )
    yield "memory a record, resident", f"{scale['resident_bytes_a_record']:.0f} B", "200 B"
    yield "memory a record, table alone", f"{scale['table_bytes_a_record']:.0f} B", ""
    yield f"opening {count} records with a good index", f"{scale['reopen_seconds']:.2f} s", "5 s"
    yield f"put of {format_bytes(scale['record_bytes'])}, relaxed", f"{scale['put_us_a_record']:.0f} us a record", ""
    yield from _in_memory_lines(scale)
    rebuild = scale["rebuild"]
    what = f"rebuild of {rebuild['records']:,} records of {format_bytes(rebuild['record_bytes'])}, every byte verified"
    measured = f"{rebuild['bytes_a_second'] / 1e9:.2f} GB/s"
    if rebuild["fio_best"]:
        plain = f"{rebuild['fio_bytes_a_second'] / 1e9:.2f} GB/s ({rebuild['fio_best']})"
        measured += f"\n{_ratio(rebuild['vs_fio'])} of fio's {plain}"
    yield what, measured, "fio's"


def _in_memory_lines(scale: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    batch = f"{scale['lookup_batch']:,}"
    what = f"among {scale['host_records']:,} in memory, batches of {batch}"
    yield f"look-up {what}, present", f"{scale['host_lookup_us_a_key_present']:.2f} us a key", "3 us"
    yield f"look-up {what}, absent", f"{scale['host_lookup_us_a_key_absent']:.2f} us a key", "3 us"
    yield "memory a record in memory, payload excluded", f"{scale['host_resident_bytes_a_record']:.0f} B", "200 B"


def _rates(summary: Mapping[str, Any]) -> str:
    half = (summary["most"] - summary["least"]) / 2 / summary["median"]
    return f"{summary['median'] / 1e9:.2f}\n±{half:.0%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _label(name: str) -> str:
    return PEERS[name].label if name in PEERS else name
