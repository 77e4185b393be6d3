"""``kvtier demo``: needles found under each policy, measured, and wrong results told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.cli import demo_run
from kvtier.cli.demo_row import STOCK, Row
from kvtier.cli.demo_run import DemoResult, split_policies
from kvtier.cli.main import run
from kvtier.errors import InputError
from kvtier.testing.induction import read_default_document

ROW_KEYS = {"found", "recall", "agreement", "bytes", "prefill_s", "decode_tokens_per_s"}


def row(**changed: Any) -> Row:
    """A row as it should be, with some fields set."""
    fields: dict[str, Any] = {
        "name": "full",
        "lossless": True,
        "tokens": ((1, 2),),
        "found": 2,
        "agreement": 1.0,
        "bytes": {"device": 2**20, "host": 0, "nvme": 0},
        "prefill": "once, forked",
        "prefill_s": 0.5,
        "first_token_s": 0.1,
        "decode_tokens_per_s": 12.0,
    }
    return Row(**(fields | changed))


def result(*rows: Row) -> DemoResult:
    """A demo of two needles that gave these rows."""
    document = SimpleNamespace(needles=(1, 2), context=2048)
    scene = SimpleNamespace(document=document, kv_bytes=2**23, source="a text")
    return DemoResult(scene=scene, rows=(row(name=STOCK), *rows), device_bytes=2**20)  # type: ignore[arg-type]


def test_small_demo_finds_everything_in_a_fraction_of_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--context", "2048", "--needles", "3", "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["context_tokens"] == 2048
    assert told["needles"] == 3
    assert list(told["policies"]) == ["full", "snapkv", "quest"]
    for entry in (*told["policies"].values(), told["stock"]):
        assert set(entry) >= ROW_KEYS
        assert set(entry["bytes"]) == {"device", "host", "nvme"}
        assert entry["prefill_s"] > 0
        assert entry["decode_tokens_per_s"] > 0
    full, snapkv, quest = told["policies"].values()
    assert (full["found"], full["recall"], full["agreement"]) == (3, 1.0, 1.0)
    assert told["stock"]["found"] == 3
    assert told["stock"]["bytes"]["device"] >= told["kv_bytes"] * 0.98
    for entry in (full, quest):
        assert entry["bytes"]["device"] <= told["device_bytes"] <= told["kv_bytes"] // 4
        assert entry["bytes"]["host"] > told["kv_bytes"] // 2
        assert entry["prefill"] == "once, forked"
    assert snapkv["prefill"] == "per question"
    assert snapkv["bytes"]["device"] <= told["device_bytes"]


def test_table_on_a_document_with_nvme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "document.txt"
    document.write_text(read_default_document(1024), encoding="utf-8")
    line = ["demo", "--document", str(document), "--context", "1024", "--needles", "2", "--policies", "full"]

    assert run([*line, "--nvme", str(tmp_path), "--host-bytes", "1MiB", "--quiet"]) == 0

    out, err = capsys.readouterr()
    assert "2 needles in 1024 tokens of document.txt" in out
    assert "induction model" in out
    assert "torch" in out
    assert "NVMe  " in out
    assert [line.split()[0] for line in out.splitlines() if "2/2" in line] == ["transformers", "full"]
    assert err == ""


def test_exact_rows_that_are_wrong_are_told() -> None:
    assert result(row()).complaints == []
    assert result(row(name="quest", lossless=False, agreement=0.5, found=0)).complaints == []
    (differs,) = result(row(agreement=0.875)).complaints
    assert differs == "full is exact, but only 87.5% of its tokens are those of transformers"
    (misses,) = result(row(found=1)).complaints
    assert misses == "full is exact, but found only 1 of 2 needles"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_wrong_result_is_exit_code_1(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_run, "run_demo", lambda *_: result(row(found=1)))

    assert run(["demo", *(["--json"] if as_json else [])]) == 1

    out, err = capsys.readouterr()
    assert err == "wrong: full is exact, but found only 1 of 2 needles\n"
    if as_json:
        assert json.loads(out)["policies"]["full"]["recall"] == 0.5
    else:
        assert "1/2" in out


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("full", ("full",)),
        ("full, quest", ("full", "quest")),
        ("snapkv(window=16, kernel=5) | quest,full", ("snapkv(window=16, kernel=5) | quest", "full")),
    ],
)
def test_names_are_split_at_commas_outside_parentheses(text: str, names: tuple[str, ...]) -> None:
    assert split_policies(text) == names


@pytest.mark.parametrize("text", ["", "full,", ",full", "full,,quest"])
def test_empty_names_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="separated by commas"):
        split_policies(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policies", "full,nope"], "nope"),
        (["--context", "20"], "context"),
        (["--context", "2048", "--needles", "500"], "needles"),
        (["--context", "2048", "--keep", "4096"], "keep must be from 1 to the 2048 tokens"),
        (["--context", "2048", "--read", "0"], "read must be from 1 to the 2048 tokens"),
        (["--device-bytes", "much"], "much"),
        (["--document", "/nowhere/text"], "/nowhere/text"),
        (["--context", "512", "--policies", "full", "--nvme", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--context", "512", "--policies", "full", "--device-bytes", "1KiB"], "device"),
    ],
)
def test_bad_input_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--quiet", *options]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
