"""The benchmark of kernels: a quick run times every operator and says how fast the memory is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


def test_a_quick_run_gives_every_number(tmp_path: Path) -> None:
    words = ["kernels", "--quick", "--device", "cpu", "--json", str(tmp_path / "result.json")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    done = subprocess.run([sys.executable, "-P", RUN, *words], cwd=tmp_path, env=env, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [(case["context"], case["dtype"]) for case in result["results"]] == [(2048, "float32"), (2048, "bfloat16")]
    first, second = ({row["name"] for row in case["rows"]} for case in result["results"])
    assert {"attention, one run", "quest at 1/16, the session included", "top pages"} <= first
    assert "top pages" not in second, "what has no type is timed once"
    for case in result["results"]:
        for row in case["rows"]:
            assert row["bytes_read"] > 0
            speed = row["bytes_read"] / row["median_s"] / 1e9
            assert row["of_bandwidth"] == pytest.approx(speed / case["bandwidth_gb_per_s"])
    assert "attention, one run" in done.stdout
