"""How many layers of a model fit into memory."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


@pytest.mark.parametrize(("free", "layers"), [(1000, 4), (401, 4), (400, 3), (250, 2), (150, 1), (5, 1)])
def test_as_many_layers_as_fit_and_one_at_least(free: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(str(RUN))
    from benchmarks.decode import settings

    monkeypatch.setattr(settings, "available_bytes", lambda: free)

    assert settings.most_that_fit(4, lambda count: 100 * count) == layers
