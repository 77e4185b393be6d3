"""What an import costs: ``import kvtier`` and ``kvtier --help`` load no torch, and answer at once."""

import json
import resource
import subprocess
import sys

import pytest

HEAVY = {"accelerate", "numpy", "torch", "transformers", "triton"}
HELP_LIMIT_S = 0.3
RUNS = 7

LIST_MODULES = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
SHOW_HELP = "from kvtier.cli.main import run; run(['--help'])"


def python(code: str) -> str:
    """Standard output of a fresh interpreter that runs some code."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after some code."""
    return set(json.loads(python(f"{code}\n{LIST_MODULES}").splitlines()[-1]))


def cpu_seconds(code: str) -> float:
    """Least CPU time of several fresh interpreters: what the code costs, whatever else the machine does."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    costs = []
    for _ in range(RUNS):
        before = spent()
        python(code)
        costs.append(spent() - before)
    return min(costs)


def test_import_loads_nothing_but_the_standard_library() -> None:
    added = loaded_by("import kvtier") - loaded_by("import importlib")
    assert {name for name in added if name not in sys.stdlib_module_names} == {"kvtier"}


@pytest.mark.parametrize("module", ["kvtier.types", "kvtier.errors", "kvtier.config", "kvtier.registry"])
def test_words_and_settings_load_no_torch(module: str) -> None:
    assert loaded_by(f"import {module}").isdisjoint(HEAVY)


def test_help_loads_no_torch() -> None:
    assert loaded_by(SHOW_HELP).isdisjoint(HEAVY)


def test_help_answers_at_once() -> None:
    assert cpu_seconds(SHOW_HELP) - cpu_seconds("") < HELP_LIMIT_S
