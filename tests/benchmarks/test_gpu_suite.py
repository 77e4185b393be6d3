"""The suite for machines with a GPU, as far as it can be tried without one: refusals, steps, what it measures."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvtier

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SUITE = BENCHMARKS / "gpu_suite.sh"
MINUTES = 9

pytestmark = pytest.mark.skipif(
    not SUITE.exists(), reason="a source distribution has no benchmarks, only a checkout has"
)

# A Python that sees a GPU, whose measurement of bandwidth fails and whose tests of models take too long.
ACTOR = """#!/usr/bin/env bash
echo "$*" >> "$(dirname "$0")/calls"
case "$*" in
  *torch.cuda*) echo "A Make-Believe GPU" ;;
  *"bandwidth.json"*) echo "no bandwidth"; exit 3 ;;
  *test-models*) exit 124 ;;
esac
"""


def suite(*words: str, python: str, wheels: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": "", "KVTIER_WHEELS": wheels}
    return subprocess.run([SUITE, *words], env=environment, capture_output=True, text=True, timeout=60)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = suite(str(tmp_path), python=sys.executable)
    assert done.returncode == 2
    assert "no GPU here" in done.stderr


def test_bad_use_is_told(tmp_path: Path) -> None:
    assert "usage:" in suite(python=sys.executable).stderr
    done = suite(str(tmp_path), python="/nonexistent/python")
    assert done.returncode == 2
    assert "torch cannot be imported" in done.stderr


def test_a_step_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    actor = tmp_path / "python"
    actor.write_text(ACTOR, encoding="utf-8")
    actor.chmod(0o755)
    (tmp_path / "light-1-py3-none-any.whl").touch()
    done = suite(str(tmp_path / "out"), python=str(actor), wheels=str(tmp_path))
    assert done.returncode == 1, done.stderr
    steps = json.loads((tmp_path / "out" / "steps.json").read_text(encoding="utf-8"))
    failed = {name: step["exit"] for name, step in steps.items() if step["exit"]}
    assert failed == {"test-models": 124, "bandwidth": 3}
    assert list(steps)[-1] == "choices"
    assert "no bandwidth" in done.stdout
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    assert f"-m zipfile -e {tmp_path}/light-1-py3-none-any.whl {tmp_path}/out/site" in calls
    assert all((tmp_path / "out" / f"{name}.log").exists() for name in steps)


def test_all_limits_together_are_under_nine_minutes() -> None:
    limits = re.findall(r"^(?:step|pytest|bench) \S+ (\d+) ", SUITE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(limits) == 9
    assert sum(map(int, limits)) < MINUTES * 60


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "gpu" / name))


def test_a_checkout_that_is_not_installed_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script("link.py")["link"](tmp_path) == "kvtier is installed from this checkout"
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    script("link.py")["link"](tmp_path)
    assert (tmp_path / "kvtier").resolve() == BENCHMARKS.parent / "kvtier"
    (described,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (described.name, described.version) == ("kvtier", kvtier.__version__)
    assert [entry.value for entry in described.entry_points] == ["kvtier.testing.plugin"]


def test_the_environment_is_told_whatever_is_missing() -> None:
    found, whole = script("environment.py")["collect"]()
    assert whole == torch.cuda.is_available()
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_shards_run_every_test_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    test = tmp_path / "test_numbers.py"
    test.write_text(
        "import pytest\n\n@pytest.mark.parametrize('n', range(5))\ndef test_number(n):\n    assert n != 3\n",
        encoding="utf-8",
    )
    options = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    shards = script("shards.py")
    names = shards["collect"](str(test), options)
    assert len(names) == 5
    assert shards["run"]([str(tmp_path / name) for name in names if "3" not in name], options, 2) == 0
    assert shards["run"]([str(tmp_path / name) for name in names], options, 2) == 1
    assert "5 tests in 2 processes: exit codes [0, 1]" in capfd.readouterr().out


def benchmark(name: str) -> Any:
    runpy.run_path(str(BENCHMARKS / "run.py"))
    from benchmarks import registry

    return registry.load(name)


def test_bandwidth_is_measured() -> None:
    measured = benchmark("bandwidth").run(argparse.Namespace(device="cpu", quick=True))
    assert [row["name"] for row in measured["rows"]] == ["read", "copy, bytes read and written"]
    assert all(row["gb_per_s"] > 0 for row in measured["rows"])


def test_every_way_of_attending_is_timed() -> None:
    measured = benchmark("choices").run(argparse.Namespace(device="cpu", quick=True))
    assert len(measured["cases"]) == 2
    assert all(set(case["median_s"]) >= {"fused", "streamed", "unified"} for case in measured["cases"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["bandwidth", "choices", "decode"])
def test_a_gpu_that_is_not_there_is_told(name: str) -> None:
    asked = benchmark(name)
    with pytest.raises(RuntimeError, match="--device cuda needs a CUDA device"):
        asked.run(argparse.Namespace(device="cuda", quick=True, parts=None))
