"""What a law is made of: its test, its marker, its words, and the plugin that registers the marker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from kvtier.core.policy import Policy
from kvtier.policies.full import Full
from kvtier.testing import (
    codec_claim_laws,
    codec_laws,
    eviction_laws,
    merge_laws,
    placement_laws,
    prompt_laws,
    retrieval_laws,
    selection_laws,
)
from kvtier.testing.law import LawBroken, PolicyLaws, law, laws_of, require

SUITES = [
    codec_claim_laws.CodecClaimLaws,
    codec_laws.CodecLaws,
    eviction_laws.EvictionLaws,
    merge_laws.MergeLaws,
    placement_laws.PlacementLaws,
    prompt_laws.PromptFilterLaws,
    retrieval_laws.RetrievalLaws,
    selection_laws.SelectionLaws,
]


class Numbers(PolicyLaws):
    @law("N1", "numbers are small", number=st.integers(0, 1000), other=lambda suite, policy: st.just(policy.name))
    def test_small(self, policy: Policy, number: int, other: str) -> None:
        require(number < 37, f"{number} is large for {other}")

    @law("N2", "nothing is divided by zero", number=st.integers(0, 3))
    def test_division(self, policy: Policy, number: int) -> None:
        require(1 // number >= 0, "negative")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_small", "^N1, numbers are small: 37 is large for full\n  for number = 37\n  for other = full"),
        ("test_division", "^N2, nothing is divided by zero: the policy raised ZeroDivisionError: .*\n  for number = 0"),
    ],
)
def test_a_broken_law_says_what_was_found_in_the_smallest_case(test: str, message: str) -> None:
    with pytest.raises(LawBroken, match=message):
        getattr(Numbers(), test)(policy=Full())


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_every_test_of_a_suite_is_a_law_of_its_own(suite: type[PolicyLaws]) -> None:
    laws = laws_of(suite)

    assert len({stated.code for stated in laws}) == len(laws) == sum(name.startswith("test_") for name in dir(suite))
    assert all(stated.title[0].islower() or stated.title[0].isdigit() for stated in laws)
    for name in dir(suite):
        if name.startswith("test_"):
            marks: list[Any] = getattr(suite, name).pytestmark
            assert [mark.kwargs for mark in marks if mark.name == "law"] == [{"code": getattr(suite, name).stated.code}]


def test_codes_are_unique_over_the_suites() -> None:
    codes = [stated.code for suite in SUITES for stated in laws_of(suite)]

    assert len(set(codes)) == len(codes)


def test_a_suite_without_a_policy_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from kvtier.testing.placement_laws import PlacementLaws\n\n\nclass TestMine(PlacementLaws):\n    pass\n"
    )
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--strict-markers", "-m"]
    command += ['law(code="P9")', *([] if _plugin_is_installed() else ["-p", "kvtier.testing.plugin"]), "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "override the fixture 'policy'" in done.stdout
    assert "1 error" in done.stdout


def _plugin_is_installed() -> bool:
    from importlib.metadata import entry_points

    return any(point.value == "kvtier.testing.plugin" for point in entry_points(group="pytest11"))


def test_the_documentation_lists_every_law() -> None:
    page = (Path(__file__).parents[2] / "docs" / "laws.md").read_text(encoding="utf-8")

    for suite in SUITES:
        assert f"`{suite.__module__}.{suite.__name__}`" in page
        for stated in laws_of(suite):
            assert f"| {stated.code} | {stated.title} |" in page
