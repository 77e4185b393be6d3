"""``kvtier verify``: exit codes, what it names, what a repair leaves, and what it never touches."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.cli.main import run
from kvtier.errors import StorageError
from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.storage_backends.files.layout import QUARANTINE, record_path
from kvtier.storage_backends.records import RecordStore
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.testing.faults.files import flip_bit
from kvtier.testing.record_samples import fetch, sample_bytes, sample_key, sample_record

Opens = Callable[[Path], RecordStore]
SIZE = 50_000
MEGABYTES = 16 << 20


def segments(directory: Path) -> RecordStore:
    return SegmentRecords(directory, SegmentOptions(capacity=MEGABYTES))


def files(directory: Path) -> RecordStore:
    return FileRecords(directory, FileOptions(capacity=MEGABYTES))


KINDS = pytest.mark.parametrize("opens", [segments, files])


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[Opens], Path]:
    """Makes a directory of eight records."""

    def make(opens: Opens) -> Path:
        with opens(tmp_path / "store") as store:
            store.put([sample_record(n, SIZE, tenant=f"team {n % 2}") for n in range(8)])
        return tmp_path / "store"

    return make


def damage(directory: Path, number: int, place: int = SIZE // 2) -> None:
    """Flip a bit of the payload of a numbered record (or of its header, ``place`` below 0)."""
    payload = sample_bytes(number, 0, SIZE)
    for path in [*directory.glob("segment-*.kvt"), *directory.rglob("*.kvr")]:
        at = path.read_bytes().find(payload)
        if at >= 0:
            flip_bit(path, 8 * (at + place))
            return
    raise AssertionError(f"record {number} is in no file")


def verified(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, object]]:
    code = run(["verify", *map(str, words), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@KINDS
def test_a_sound_store_is_zero(
    opens: Opens, stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(opens)
    before = snapshot(directory)

    code, report = verified(capsys, directory)

    assert (code, report["records"], report["damaged"], report["failed"]) == (0, 8, [], [])
    assert report["bytes"] == 8 * (4096 + 53_248)
    assert report["kind"] == ("segment" if opens is segments else "files")
    assert snapshot(directory) == before


@KINDS
@pytest.mark.parametrize("place", [0, SIZE - 1, -4096 + 20], ids=["first byte", "last byte", "header"])
def test_damage_is_one_and_named_and_repaired(
    opens: Opens, place: int, stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(opens)
    damage(directory, 3, place)
    before = snapshot(directory)

    code, report = verified(capsys, directory)
    assert (code, report["damaged"]) == (1, [sample_key(3).hex()])
    assert snapshot(directory) == before, "looking changed something"

    code, report = verified(capsys, directory, "--repair")
    assert (code, report["damaged"], report["repaired"]) == (1, [sample_key(3).hex()], True)
    code, report = verified(capsys, directory)
    assert (code, report["records"], report["damaged"]) == (0, 7, [])
    with opens(directory) as store:
        for number in range(8):
            assert fetch(store, number, SIZE) == (None if number == 3 else sample_bytes(number, 0, SIZE))
        assert store.put([sample_record(3, SIZE)])[0].state.value == "stored"


def test_a_repaired_file_is_kept_in_quarantine(stored: Callable[[Opens], Path]) -> None:
    directory = stored(files)
    damage(directory, 5)

    assert run(["verify", str(directory), "--repair"]) == 1

    (kept,) = (directory / QUARANTINE).iterdir()
    assert kept.name.startswith(sample_key(5).hex())
    assert not record_path(directory, sample_key(5)).exists()


def test_an_index_that_is_gone_is_written_anew(
    stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(segments)
    for path in directory.glob("index.sqlite*"):
        path.unlink()

    code, report = verified(capsys, directory)
    assert (code, report["records"], report["index_rebuilt"]) == (0, 8, True)
    assert not list(directory.glob("index.sqlite*")), "looking made an index"
    assert run(["verify", str(directory), "--repair"]) == 0
    capsys.readouterr()
    code, report = verified(capsys, directory)
    assert (code, report["records"], report["index_rebuilt"]) == (0, 8, False)


@KINDS
def test_a_person_reads_what_is_wrong_and_how_fast_it_was_read(
    opens: Opens, stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(opens)
    assert run(["verify", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "8 records, 448.0 KiB checked in" in said
    assert "iB/s" in said
    assert "nothing is wrong" in said

    damage(directory, 2)
    assert run(["verify", str(directory)]) == 1
    said = capsys.readouterr().out
    assert f"{sample_key(2).hex()}: damaged" in said
    assert "1 wrong; --repair puts aside or mends" in said


@pytest.mark.parametrize("words", [[], ["--repair"]])
def test_where_there_is_no_store_none_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for place, said in (
        (tmp_path, "no kvtier store"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "notes.txt", ""),
    ):
        assert run(["verify", str(place), *words]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert str(place) in captured.err
        assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_directory_is_bad_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify"]) == 2
    assert "DIR" in capsys.readouterr().err


HOLD = """
import sys
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
with SegmentRecords(sys.argv[1], SegmentOptions(capacity=16 << 20)):
    print("open", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("verb", [["verify"], ["verify", "--repair"], ["inspect"]])
def test_a_segment_directory_in_use_is_left_alone(
    stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    directory = stored(segments)
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        code = run([*verb, str(directory)])
        holder.communicate("done\n", timeout=60)

    assert code == 2
    said = capsys.readouterr().err
    assert f"process {holder.pid}" in said
    assert str(directory) in said
    assert said.count("\n") == 1


def test_a_files_directory_in_use_is_checked_beside_its_users(
    stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(files)
    with files(directory) as store:
        code, report = verified(capsys, directory)
        assert (code, report["records"]) == (0, 8)
        damage(directory, 1)
        assert verified(capsys, directory, "--repair")[0] == 1
        assert fetch(store, 1, SIZE) is None
        assert store.put([sample_record(1, SIZE)])[0].state.value == "stored"


def test_a_damaged_superblock_is_named_and_mended(
    stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(segments)
    flip_bit(directory / "segment-00000001.kvt", 3)
    before = snapshot(directory)

    code, report = verified(capsys, directory)
    assert (code, report["records"], report["damaged"]) == (1, 8, ["segment-00000001.kvt"])
    assert report["lost_segments"] == []
    assert snapshot(directory) == before
    assert run(["verify", str(directory), "--repair"]) == 1
    assert "a superblock is damaged, nothing of it is lost" in capsys.readouterr().out
    code, report = verified(capsys, directory)
    assert (code, report["records"], report["damaged"]) == (0, 8, [])


def test_a_segment_that_cannot_be_opened_is_wrong(
    stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(segments)
    (directory / "segment-00000001.kvt").rename(directory / "kept")
    (directory / "segment-00000001.kvt").mkdir()

    code, report = verified(capsys, directory)
    assert (code, report["lost_segments"]) == (1, ["segment-00000001.kvt"])
    with segments(directory) as store:
        assert store.put([sample_record(50, SIZE)])[0].state.value == "stored", "its number was not passed over"


def test_a_repair_that_a_full_disk_stops_says_so(
    stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = stored(segments)

    def full(*_: object) -> None:
        raise StorageError("database or disk is full")

    monkeypatch.setattr("kvtier.storage_backends.segment.index.SegmentIndex.commit", full)
    code = run(["verify", str(directory), "--repair", "--json"])
    captured = capsys.readouterr()
    assert (code, json.loads(captured.out)["repaired"]) == (1, False)
    assert "wrong: not repaired: " in captured.err


def test_a_copy_without_its_lock_is_told_what_it_lacks(
    stored: Callable[[Opens], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stored(segments)
    (directory / "lock").unlink()
    assert run(["verify", str(directory)]) == 2
    assert "A copy of one needs an empty file of this name" in capsys.readouterr().err
    (directory / "lock").touch()
    assert run(["verify", str(directory)]) == 0


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("| true", 141), (">&-", 0), ("2>&- >/dev/null", 0), (">/dev/full", 2), ("--json | true", 141)],
)
def test_the_exit_code_is_of_the_store_whatever_becomes_of_the_output(
    stored: Callable[[Opens], Path], ending: str, expected: int
) -> None:
    command = f"{sys.executable} -P -m kvtier.cli verify {stored(files)} {ending}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "Traceback" in done.stderr) == (expected, False), done.stderr
    assert ("standard output: No space left" in done.stderr) == (ending == ">/dev/full")
