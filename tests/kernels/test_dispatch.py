"""Which implementation is chosen, by device and by ``KVTIER_KERNELS``, and what is told about it."""

from functools import partial
from pathlib import Path

import pytest
import torch

import kvtier.kernels
from kvtier.errors import ConfigError
from kvtier.kernels import dispatch
from kvtier.kernels.dispatch import ENVIRONMENT_VARIABLE, Candidate, Operator, chosen

CPU, META = torch.device("cpu"), torch.device("meta")


def only_meta(device: torch.device) -> str | None:
    return None if device.type == "meta" else f"needs a meta device, got {device}"


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def operator() -> Operator[str]:
    return Operator(
        "toy",
        [
            Candidate("special", lambda: "the special one", "quickest", only_meta),
            Candidate("plain", lambda: "the plain one", "always works"),
        ],
    )


def test_the_first_that_can_run_is_chosen(operator: Operator[str]) -> None:
    assert operator.on(META) == "the special one"
    assert operator.on(CPU) == "the plain one"


def test_the_reason_names_what_was_passed_over(operator: Operator[str]) -> None:
    assert operator.choice(META) == ("special", "quickest")
    assert operator.choice(CPU) == ("plain", "always works; not special: needs a meta device, got cpu")


def test_an_override_wins(operator: Operator[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, " Plain ")
    assert operator.on(META) == "the plain one"
    assert operator.choice(META) == ("plain", "asked for by KVTIER_KERNELS=plain")


@pytest.mark.parametrize("value", ["", "auto", "AUTO"])
def test_no_override(operator: Operator[str], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
    assert operator.on(CPU) == "the plain one"


def test_an_unknown_override_is_refused(operator: Operator[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "magic")
    with pytest.raises(ConfigError, match="must be one of auto, special, plain for toy, got 'magic'"):
        operator.on(CPU)


def test_an_override_that_only_others_have_changes_nothing(
    operator: Operator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert operator.on(CPU) == "the plain one"


def test_an_override_that_cannot_run_is_refused(operator: Operator[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "special")
    with pytest.raises(ConfigError, match="cannot run toy on cpu: needs a meta device, got cpu"):
        operator.on(CPU)


def test_no_candidate_is_an_error_with_reasons() -> None:
    operator = Operator("toy", [Candidate("special", lambda: "the special one", "quickest", only_meta)])
    with pytest.raises(ConfigError, match="no implementation of toy runs on cpu: not special: needs a meta device"):
        operator.on(CPU)


def test_an_implementation_is_loaded_once_and_only_when_chosen() -> None:
    loaded: list[str] = []

    def load(name: str) -> str:
        loaded.append(name)
        return name

    operator = Operator("toy", [Candidate(name, partial(load, name), "") for name in ("first", "second")])
    assert [operator.on(CPU) for _ in range(3)] == ["first"] * 3
    assert loaded == ["first"]


def test_chosen_covers_every_operator_folder() -> None:
    here = Path(kvtier.kernels.__file__).parent
    folders = {entry.name for entry in here.iterdir() if (entry / "__init__.py").is_file()}
    assert set(chosen().choices) == folders == set(dispatch.OPERATORS)


def test_chosen_reads_as_a_sentence() -> None:
    told = str(chosen("cpu"))
    assert told.startswith("cpu: ")
    assert " for column_sums" in told
    assert "fastest in plain torch" in told


def test_chosen_follows_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert {choice.implementation for choice in chosen().choices.values()} == {"reference"}
