"""Settings go into the result as they are; how many layers of a model fit into memory."""

from __future__ import annotations

import argparse
import json
import runpy
from dataclasses import asdict
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "proper"])
def test_settings_are_plain_values(quick: bool) -> None:
    runpy.run_path(str(RUN))
    from benchmarks.decode.settings import settings_of

    none = dict.fromkeys(("contexts", "dtypes", "generated", "parts"))
    settings = settings_of(argparse.Namespace(quick=quick, device="cpu", **none))

    assert json.loads(json.dumps(asdict(settings)))["overhead_limits"]["most"] == (5 if quick else 64)


@pytest.mark.parametrize(("free", "layers"), [(1000, 4), (401, 4), (400, 3), (250, 2), (150, 1), (5, 1)])
def test_as_many_layers_as_fit_and_one_at_least(free: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(str(RUN))
    from benchmarks.decode import settings

    monkeypatch.setattr(settings, "available_bytes", lambda: free)

    assert settings.most_that_fit(4, lambda count: 100 * count) == layers
