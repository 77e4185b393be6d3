"""``kvtier policies check``: laws by role, counter-examples in words, exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.cli.main import run

MODULE = """
from dataclasses import dataclass
from kvtier.policies.eviction.snapkv import SnapKV
from kvtier.policies.placement.lru import LRU
from kvtier.core.policy import KeepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Empties(SnapKV):
    def select(self, scores, view, keep):
        return KeepPlan(SnapKV.select(self, scores, view, keep).keep[..., : int(keep * 0.9)])


def narrow():
    return Empties(window=1)


class Fine(LRU):
    pass


number = 3


def needs_arguments(one):
    return one
"""


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "somebodys_policies.py").write_text(MODULE)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        yield


@pytest.mark.usefixtures("other_package")
def test_a_broken_law_is_told_with_its_smallest_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policies", "check", "somebodys_policies:narrow", "-n", "20", "--law", "S1", "--law", "S3"]) == 1

    out = capsys.readouterr().out
    assert "S1, a row keeps exactly its budget, or all it has, and each KV head at least its part of it: " in out
    assert "row 0, KV head 0: 2 of 2 slots must stay, 1 do" in out
    assert "for 1 rows, 1 KV heads of 1 query heads, 2 slots, keep 2, torch.float32" in out
    assert "1 of 2 laws broken, 20 cases a law" in out


@pytest.mark.usefixtures("other_package")
def test_json_has_every_law(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policies", "check", "somebodys_policies:Fine", "-n", "3", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("policy", "roles", "examples", "broken")} == {
        "policy": "somebodys_policies:Fine",
        "roles": ["placement"],
        "examples": 3,
        "broken": 0,
    }
    by_code = {law["code"]: law for law in found["laws"]}
    assert by_code["P1"]["holds"] is True
    assert by_code["P11"] == {
        "policy": "lru",
        "code": "P11",
        "title": "a scan does not flush what is used again and again, if the policy says so",
        "holds": None,
        "found": "lru does not claim to resist scans",
    }


def test_registered_policies_are_checked_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policies", "check", "snapkv(window=2) | quest | s3fifo", "-n", "2", "--quiet"]) == 0

    out, err = capsys.readouterr()
    assert all(name in out for name in ("snapkv", "quest", "s3fifo", "S17", "R11", "P9"))
    assert err == ""


@pytest.mark.usefixtures("other_package")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobodys_policies:Mine"], "nobodys_policies cannot be imported"),
        (["somebodys_policies:Mine"], "somebodys_policies has no Mine"),
        (["somebodys_policies:number"], "is a int, which is no kvtier.core.policy.Policy"),
        (["somebodys_policies:needs_arguments"], "must be made without arguments"),
        (["snapk"], "did you mean 'snapkv'?"),
        (["lru", "--law", "S1"], "lru has no law S1; its laws are P1, P11, P2"),
        (["lru", "-n", "0"], "-n"),
    ],
)
def test_bad_use_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policies", "check", *words]) == 2

    assert message in capsys.readouterr().err
