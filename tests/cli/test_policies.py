"""``kvtier policies``: every registered policy, by name and paper."""

import json

import pytest

from kvtier import registry
from kvtier.cli.main import run


def test_json_lists_every_registered_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policies", "--json"]) == 0

    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == registry.policies.names()
    assert all(set(entry) == {"name", "roles", "paper", "lossless"} for entry in listed)
    by_name = {entry["name"]: entry for entry in listed}
    assert by_name["snapkv"]["roles"] == ["selection"]
    assert by_name["quest"]["roles"] == ["retrieval"]
    assert by_name["full"]["lossless"] is True
    assert by_name["snapkv"]["lossless"] is False
    assert "2024" in by_name["snapkv"]["paper"]


def test_table_names_policies_and_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policies"]) == 0

    out, err = capsys.readouterr()
    assert all(name in out for name in ("full", "quest", "snapkv", "Li et al. 2024"))
    assert err == ""


def test_a_policy_that_cannot_be_loaded_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = registry.policies.entries | {"broken": registry.Entry("kvtier.nowhere:Broken", "pip install nowhere")}
    monkeypatch.setattr(registry.policies, "entries", entries)

    assert run(["policies", "--json"]) == 1

    out, err = capsys.readouterr()
    assert "broken" not in [entry["name"] for entry in json.loads(out)]
    assert "full" in [entry["name"] for entry in json.loads(out)]
    assert err.startswith("wrong: broken: ")
    assert "pip install nowhere" in err
