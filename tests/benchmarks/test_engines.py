"""The benchmark of engines: a quick run gives every number, and the file is gone afterwards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_a_quick_run_gives_every_number(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["engines", "--quick", "--directory", str(scratch), "--json", str(tmp_path / "result.json")]

    done = subprocess.run([sys.executable, "-P", RUN, *words], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["results"]
    assert [case["piece_bytes"] for case in cases] == [64 << 10, 1 << 20]
    for case in cases:
        names = list(case["speeds"])
        assert "16 threads" in names
        assert any(name.startswith("fio") for name in names)
        assert all(speed > 0 for speeds in case["speeds"].values() for runs in speeds.values() for speed in runs)
    assert "randread, MiB/s" in done.stdout
    assert list(scratch.iterdir()) == []
