"""The store benchmark, as a program: kvtier alone, and beside every peer that is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
PEERS = ("fs_native", "raw_block", "raw_block_uring", "vllm_fs", "nixl", "nixl_uring", "mooncake")
PROBES = {
    "one bit flipped at rest",
    "file cut at rest",
    "SIGKILL after durable puts",
    "SIGKILL after relaxed puts",
}
READS = {(name, way) for name in ("64 KiB", "64 x 64 KiB") for way in ("read", "randread")}
WRITES = {(f"{name}, {way}", "write") for name in ("64 KiB", "64 x 64 KiB") for way in ("durable", "relaxed")}

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, RUN, "store", *words], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result and screen of a quick run of kvtier alone."""
    folder = tmp_path_factory.mktemp("bench")
    done = run("--quick", "--directory", str(folder), "--json", "result.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["result.json"], "the run must leave nothing behind"
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), done.stdout


def test_every_row_has_kvtier_and_what_the_ratio_says(quick: tuple[dict[str, Any], str]) -> None:
    rows = {(row["name"], row["what"]): row for row in quick[0]["results"]["speed"]["rows"]}

    assert rows.keys() == READS | WRITES
    for row in rows.values():
        ours = row["competitors"]["kvtier"]
        assert 0 < ours["least"] <= ours["median"] <= ours["most"]
        assert len(ours["rounds"]) == quick[0]["settings"]["repeats"]
        assert (row["peer_best"], row["vs_peer"]) == (None, None)


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_is_the_best_of_its_settings(quick: tuple[dict[str, Any], str]) -> None:
    for row in quick[0]["results"]["speed"]["rows"]:
        plain = {name: found["median"] for name, found in row["competitors"].items() if name != "kvtier"}
        assert len(plain) == 4
        assert plain[row["fio_best"]] == max(plain.values())
        assert row["vs_fio"] > 0


def test_without_fio_the_run_says_so() -> None:
    result = json.loads(
        run_python(
            "import json; from benchmarks.store import fio; fio.shutil.which = lambda name: None; "
            "print(json.dumps([fio.missing(), fio.version()]))"
        )
    )

    assert result == ["fio is not installed (apt-get install fio)", "not installed"]


def test_kvtier_returns_no_wrong_byte_and_loses_no_durable_record(quick: tuple[dict[str, Any], str]) -> None:
    probes = quick[0]["results"]["integrity"]["probes"]

    assert probes.keys() == PROBES
    assert probes["one bit flipped at rest"] == {"kvtier": "a miss"}
    assert "wrong" not in probes["file cut at rest"]["kvtier"]
    assert probes["SIGKILL after durable puts"] == {"kvtier": "8 of 8 left"}


def test_host_and_scale_are_measured(quick: tuple[dict[str, Any], str]) -> None:
    host, scale = quick[0]["results"]["host"], quick[0]["results"]["scale"]
    records, chunks, _, copy = (row["median_s"] for row in host["rows"])

    assert host["vs_memcpy"] == pytest.approx(copy / records)
    assert host["typed_vs_memcpy"] == pytest.approx(copy / chunks)
    assert scale["host_records"] == 2000
    assert scale["host_lookup_us_a_key_present"] > 0
    assert scale["records"] == 2000
    for name in ("lookup_us_a_key_present", "lookup_us_a_key_absent", "reopen_seconds", "put_us_a_record"):
        assert scale[name] > 0
    assert scale["table_bytes_a_record"] < 200
    assert scale["rebuild"]["bytes_a_second"] > 0


def test_result_names_settings_and_no_path(quick: tuple[dict[str, Any], str]) -> None:
    result, text = quick[0], json.dumps(quick[0])

    assert result["settings"]["peers"] == []
    assert result["settings"]["direct"] in (True, False)
    assert result["fio"]
    assert str(RUN.parents[1]) not in text
    assert str(Path(sys.prefix)) not in text


def test_tables_show_rows_probes_and_targets(quick: tuple[dict[str, Any], str]) -> None:
    screen = quick[1]

    for words in ("64 KiB, durable write", "64 KiB random read", "a miss", "vs best peer", "memory a record", "200 B"):
        assert words in screen


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason(tmp_path: Path) -> None:
    words = ("--quick", "--parts", "integrity", "--peers", "vllm_fs", "--json", "result.json")
    env = os.environ | {"KVTIER_PEERS": str(tmp_path / "none"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, RUN, "store", *words, "--directory", str(tmp_path)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert "--install" in result["absent"]["vllm_fs"]
    assert "left out: vLLM fs tier" in done.stdout
    assert set(result["results"]["integrity"]["probes"]["one bit flipped at rest"]) == {"kvtier"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--peers", "rocksdb"), "must be of"),
        (("--parts", "all"), "must be of"),
        (("--repeats", "0"), "at least 1"),
    ],
    ids=["unknown peer", "unknown part", "no repeats"],
)
def test_bad_use_is_told(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run("--quick", *words, cwd=tmp_path)

    assert done.returncode == 2
    assert told in done.stderr


def test_peers_are_those_of_the_table() -> None:
    assert json.loads(
        run_python("import json; from benchmarks.peers.environments import PEERS; print(json.dumps(list(PEERS)))")
    ) == list(PEERS)


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_an_installed_peer_stores_reads_and_is_probed(peer: str, tmp_path: Path) -> None:
    reason = run_python(f"from benchmarks.peers import environments as e; print(e.installed(e.PEERS[{peer!r}]) or '')")
    if reason.strip():
        pytest.skip(reason.strip())
    words = ("--quick", "--parts", "speed,integrity", "--peers", peer, "--repeats", "1", "--json", "result.json")
    done = run(*words, "--directory", str(tmp_path), cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["results"]
    assert results["speed"]["failed"] == {}
    rows = {(row["name"], row["what"]): row for row in results["speed"]["rows"]}
    assert all(rows[read]["competitors"][peer]["median"] > 0 for read in READS)
    assert "wrong bytes, as a hit" in results["integrity"]["probes"]["one bit flipped at rest"][peer]


def run_python(code: str) -> str:
    """What a program prints that sees the benchmarks as `run.py` does."""
    see = f"import runpy; runpy.run_path({str(RUN)!r}); "
    done = subprocess.run([sys.executable, "-P", "-c", see + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
