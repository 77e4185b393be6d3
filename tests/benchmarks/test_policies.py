"""The policies benchmark, quick, without kvpress: every method of kvtier, and what statistics cost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
METHODS = {"full", "streamingllm", "snapkv", "pyramidkv", "tova", "h2o", "adakv"}

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "KVTIER_PEERS": str(cwd / "peers")}
    return subprocess.run([sys.executable, RUN, *words], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result and screen of a quick run."""
    folder = tmp_path_factory.mktemp("bench")
    done = run("policies", "--quick", "--json", "result.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), done.stdout


def test_every_method_is_timed_and_compared_with_the_whole_cache(quick: tuple[dict[str, Any], str]) -> None:
    measured = quick[0]["results"]["methods"]
    rows = {row["method"]: row for row in measured["rows"]}

    assert set(rows) >= METHODS
    assert {row["side"] for row in rows.values()} == {"kvtier"}
    assert measured["left_out"] == {"kvpress": "not installed; --install makes its environment"}
    assert set(measured["versions"]) == {"kvtier"}
    assert (rows["full"]["same_tokens"], rows["full"]["divergence"]) == (1.0, 0.0)
    assert rows["full"]["found"] == rows["full"]["needles"] == 1
    for row in rows.values():
        assert min(row["prefill_s"], row["decode_s"]) > 0
        assert row["divergence"] >= 0
        assert len(row["rounds"]["prefill_s"]) == quick[0]["settings"]["rounds"]


def test_whoever_keeps_a_quarter_holds_less_than_half_of_the_bytes(quick: tuple[dict[str, Any], str]) -> None:
    rows = {row["method"]: row["kv_bytes"] for row in quick[0]["results"]["methods"]["rows"]}

    assert all(rows[name] < rows["full"] / 2 for name in METHODS - {"full"})


def test_planning_is_a_part_of_eviction_and_eviction_of_a_step(quick: tuple[dict[str, Any], str]) -> None:
    for row in quick[0]["results"]["planning"]:
        assert 0 < row["planning"] < row["eviction"] < 1


def test_statistics_are_compared_with_a_plain_prompt(quick: tuple[dict[str, Any], str]) -> None:
    rows = {row["name"]: row for row in quick[0]["results"]["statistics"]}

    assert rows["full"]["over_plain"] == 0.0
    assert len(rows) == 3


def test_the_screen_shows_every_part(quick: tuple[dict[str, Any], str]) -> None:
    assert all(
        title in quick[1] for title in ("What stays of a prompt", "Eviction at every step", "A chunk in the middle")
    )


def test_an_unknown_part_is_told(tmp_path: Path) -> None:
    done = run("policies", "--quick", "--parts", "speed", cwd=tmp_path)

    assert done.returncode == 2
    assert "must be of methods, planning, statistics, got speed" in done.stderr
