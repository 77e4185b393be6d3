"""The ground the other tests stand on: poison reaches kvtier's memory and nobody else's."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def allocate(module: str, expression: str) -> torch.Tensor:
    """Evaluate an expression as code of the named module would."""
    scope = {"__name__": module, "torch": torch, "like": torch.ones(3)}
    exec(f"tensor = {expression}", scope)  # noqa: S102 - the caller's module name is what is tested
    tensor = scope["tensor"]
    assert isinstance(tensor, torch.Tensor)
    return tensor


@pytest.mark.parametrize(
    "expression",
    ["torch.empty(3)", "torch.empty_like(like)", "torch.empty_strided((3,), (1,))", "like.new_empty(3)"],
)
def test_memory_of_kvtier_starts_as_nan(expression: str) -> None:
    assert torch.isnan(allocate("kvtier.core.pages", expression)).all()


def test_poison_spares_integers_given_outputs_and_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[float] = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: filled.append(value) or tensor)

    allocate("kvtier.core.pages", "torch.empty(3, dtype=torch.int64)")
    allocate("kvtier.core.pages", "torch.empty(3, out=like)")
    allocate("kvtierish.pages", "torch.empty(3)")
    assert filled == []

    allocate("kvtier.core.pages", "torch.empty(3)")
    assert len(filled) == 1


def test_checkout_root_is_off_the_path() -> None:
    assert ROOT not in {Path(entry or ".").resolve() for entry in sys.path}


@pytest.mark.parametrize("name", ["policies", "storage_backends", "kernels", "integrations"])
def test_folders_at_the_root_are_not_packages_of_their_own(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is None or ROOT not in Path(spec.origin or "/").resolve().parents
