"""``kvtier inspect``: what is said of a store, in both kinds of directory."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.cli import inspect as verb
from kvtier.cli.main import run
from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.storage_backends.records import RecordStore
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.testing.record_samples import NAMESPACE, fetch, sample_key, sample_record

KINDS: dict[str, Callable[[Path], RecordStore]] = {
    "segment": lambda directory: SegmentRecords(directory, SegmentOptions(capacity=16 << 20)),
    "files": lambda directory: FileRecords(directory, FileOptions(capacity=16 << 20)),
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_json_says_what_is_stored(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with KINDS[kind](tmp_path / "store") as store:
        store.put([sample_record(n, 9000, tenant="big" if n else "small") for n in range(4)])
        for _ in range(3):
            fetch(store, 2, 9000)
        fetch(store, 1, 9000)

    assert run(["inspect", str(tmp_path / "store"), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["records"], found["live_bytes"]) == (kind, 4, 4 * 16_384)
    assert found["held_bytes"] >= found["live_bytes"]
    assert found["tenants"] == [
        {"name": "big", "records": 3, "live_bytes": 3 * 16_384},
        {"name": "small", "records": 1, "live_bytes": 16_384},
    ]
    assert found["namespaces"] == [{"name": NAMESPACE.hex(), "records": 4, "live_bytes": 4 * 16_384}]
    assert time.time() - 600 < found["oldest"] <= found["newest"] <= time.time() + 1
    hottest = [(record["key"], record["hits"]) for record in found["hottest"]]
    assert hottest == ([(sample_key(2).hex(), 3), (sample_key(1).hex(), 1)] if kind == "segment" else [])


def test_a_person_reads_tables(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with KINDS[kind](tmp_path / "store") as store:
        store.put([sample_record(n, 9000, tenant="[bold]team[/bold]") for n in range(2)])
        fetch(store, 1, 9000)

    assert run(["inspect", str(tmp_path / "store")]) == 0

    said = capsys.readouterr().out
    assert f"{kind}, 2 records, 32.0 KiB live" in said
    assert "seconds ago" in said
    assert "[bold]team[/bold]" in said
    assert NAMESPACE.hex() in said
    assert (sample_key(1).hex() in said) == (kind == "segment")


def test_an_empty_store_is_fine(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KINDS[kind](tmp_path / "store").close()

    assert run(["inspect", str(tmp_path / "store")]) == 0
    assert "0 records" in capsys.readouterr().out


def test_where_there_is_no_store_none_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path)]) == 2
    assert "no kvtier store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (0, "0 seconds"),
        (100, "100 seconds"),
        (130, "2 minutes"),
        (8000, "2 hours"),
        (9e5, "10 days"),
    ],
)
def test_ages_are_words(age: float, words: str) -> None:
    assert verb._ago(time.time() - age) == f"{words} ago"
