"""Every Triton kernel compiles for every chip without a GPU: nothing spills on NVIDIA, and shared memory suffices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OPERATORS = {path.parent.name for path in (ROOT / "kernels").glob("*/triton.py")}


def compile_all(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Interpreter and compiler need processes of their own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "kvtier.kernels.aot", "--json", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.timeout(300)
def test_kernels_compile_for_every_chip(tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    done = compile_all(path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["kernels"]
    assert {row["operator"] for row in rows} == OPERATORS
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(row["shared"] <= row["shared_limit"] for row in rows)
    assert not [row for row in rows if row["target"].startswith("sm_") and row["spilled"]]


def test_the_committed_table_is_of_these_kernels() -> None:
    tables = sorted((ROOT / "benchmarks" / "results").glob("kernels-*.json"))
    assert tables
    for table in tables:
        rows = json.loads(table.read_text())["kernels"]
        assert {row["operator"] for row in rows} == OPERATORS
