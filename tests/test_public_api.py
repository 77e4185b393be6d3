"""The names that ``kvtier`` promises: sorted, complete, importable, and the same for people and for type checkers."""

import ast
import importlib
from pathlib import Path

import pytest

import kvtier

PROMISED = [name for name in kvtier.__all__ if not name.startswith("__")]


def names_for_checkers() -> dict[str, str]:
    """Public name to the module that the ``TYPE_CHECKING`` block of ``kvtier/__init__.py`` imports it from."""
    tree = ast.parse(Path(kvtier.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}


def test_all_is_without_repeats() -> None:
    assert len(kvtier.__all__) == len(set(kvtier.__all__))


def test_checkers_see_the_same_names() -> None:
    assert set(names_for_checkers()) == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_name_leads_to_the_object_that_checkers_see(name: str) -> None:
    home = importlib.import_module(names_for_checkers()[name])

    assert getattr(kvtier, name) is getattr(home, name)
    assert name in home.__all__


def test_every_error_is_public() -> None:
    errors = importlib.import_module("kvtier.errors")
    assert set(errors.__all__) == {name for name in PROMISED if name.endswith("Error")}


def test_dir_offers_names_that_are_not_loaded_yet() -> None:
    assert set(kvtier.__all__) <= set(dir(kvtier))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'kvtier' has no attribute 'pach'"):
        kvtier.pach  # noqa: B018 - the look-up itself is what fails
