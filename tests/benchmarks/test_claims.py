"""``benchmarks/run.py claims``: a quick run of every claim, as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
KNEE = 4

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, RUN, "claims", *words], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("claims")
    done = run("--quick", "--json", "result.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), done.stdout


def test_every_claim_stands_beside_the_published_number(quick: tuple[dict[str, Any], str]) -> None:
    result, screen = quick

    assert [found["claim"] for found in result["results"]] == ["A8", "A10"]
    for found in result["results"]:
        assert found["published"]
        assert found["source"]
        assert found["cannot"]
        for text in (found["title"], found["ours"][:40], found["published"][:40]):
            assert " ".join(text.split()) in " ".join(screen.split())


def test_filtering_finds_nothing_before_the_layer_that_retrieves(quick: tuple[dict[str, Any], str]) -> None:
    (found,) = [found for found in quick[0]["results"] if found["claim"] == "A8"]

    assert found["holds"]
    assert [row["layer"] for row in found["rows"] if row["found"] == row["of"]] == [KNEE]
    assert not any(row["found"] for row in found["rows"][:KNEE])


def test_retrieval_answers_later_questions(quick: tuple[dict[str, Any], str]) -> None:
    (found,) = [found for found in quick[0]["results"] if found["claim"] == "A10"]
    rows = {row["policy"]: row for row in found["rows"]}

    assert rows["quest"]["asked later"] == rows["full"]["asked later"] == 2
    for name in ("snapkv", "pyramidkv", "tova", "gemfilter"):
        assert (rows[name]["asked at once"], rows[name]["asked later"]) == (2, 0)


def test_an_unknown_claim_is_told(tmp_path: Path) -> None:
    done = run("--only", "A8,A99", cwd=tmp_path)

    assert done.returncode == 2
    assert "must be of A8, A10, got A99" in done.stderr
