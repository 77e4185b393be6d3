"""The example of speculation: what it decodes is what ``generate`` decodes, in fewer forwards."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "speculation" / "speculate.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_a_tree_has_every_continuation_once(script: dict[str, Any]) -> None:
    text = [5, 1, 2, 3, 9, 1, 2, 4, 9, 1]
    assert script["look_up"](text, branches=9, depth=3) == ([1, 2, 4, 9, 3, 9], [None, 0, 1, 2, 1, 4])
    assert script["look_up"](text, branches=1, depth=2) == ([1, 2, 4], [None, 0, 1])
    assert script["look_up"]([1, 2], branches=4, depth=2) == ([2], [None])


def test_the_path_follows_the_choices(script: dict[str, Any]) -> None:
    draft = script["Draft"]([1, 2, 4, 3], [None, 0, 1, 1])
    assert script["verify"](draft, [2, 3, 0, 8]) == ([0, 1, 3], [2, 3, 8])
    assert script["verify"](draft, [7, 3, 0, 8]) == ([0], [7])


@pytest.mark.parametrize("policy", ["full", "snapkv(window=16, keep=256)"])
def test_the_same_tokens_in_fewer_forwards(
    script: dict[str, Any], policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script["main"](["--context", "512", "--count", "32", "--policy", policy])
    printed = capsys.readouterr().out
    found = [int(count) for count in re.findall(r"(\d+) forwards", printed)]
    assert found[0] <= found[1] < found[2] == 31
    if policy == "full":
        assert printed.count("the same tokens as generate()") == 3
