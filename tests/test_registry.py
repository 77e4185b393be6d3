"""Lazy names: found when used, from packages of others too, and clear about what is missing."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib.metadata import EntryPoint

import pytest

from kvtier import registry
from kvtier.errors import ConfigError, MissingDependencyError
from kvtier.registry import Entry, Registry


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points of installed packages, as a list to fill."""
    points: list[EntryPoint] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return points


@pytest.fixture
def fruits(published: list[EntryPoint]) -> Registry:
    return Registry(
        kind="fruit",
        group="orchard",
        entries={
            "apple": Entry("fractions:Fraction"),
            "pear": Entry("no_such_module:Pear", hint="pip install orchard"),
        },
    )


def test_a_name_leads_to_its_object(fruits: Registry) -> None:
    from fractions import Fraction

    assert fruits.resolve("apple") is Fraction


def test_nothing_is_imported_before_it_is_used(published: list[EntryPoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    names = Registry("colour", "colours", {"hls": Entry("colorsys:rgb_to_hls")})

    assert names.names() == ["hls"]
    assert "colorsys" not in sys.modules
    names.resolve("hls")
    assert "colorsys" in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aple", "unknown fruit 'aple'; known: apple, pear; did you mean 'apple'?"),
        ("zebra", "unknown fruit 'zebra'; known: apple, pear"),
        ("", "unknown fruit ''; known: apple, pear"),
    ],
)
def test_an_unknown_name_lists_what_there_is(fruits: Registry, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        fruits.resolve(name)

    assert str(error.value) == message


def test_a_missing_package_is_named_with_its_remedy(fruits: Registry) -> None:
    with pytest.raises(MissingDependencyError, match=r"fruit 'pear' .*No module named 'no_such_module'.*; pip install"):
        fruits.resolve("pear")
    fruits.register("plum", "no_such_module.inner:Plum")
    with pytest.raises(MissingDependencyError, match="install the package that provides no_such_module"):
        fruits.resolve("plum")
    assert issubclass(MissingDependencyError, ImportError)


@pytest.mark.parametrize("target", ["decimal:Decimmal", "decimal", "decimal:"])
def test_a_target_that_does_not_exist_is_named(fruits: Registry, target: str) -> None:
    fruits.register("date", target)
    with pytest.raises(ConfigError, match=f"fruit 'date' leads to '{target}', which does not exist"):
        fruits.resolve("date")


def test_names_are_registered_once(fruits: Registry) -> None:
    fruits.register("fig", "decimal:Decimal", hint="eat it")
    fruits.register("fig", "decimal:Decimal")
    with pytest.raises(ConfigError, match="fruit 'fig' is already registered as decimal:Decimal"):
        fruits.register("fig", "fractions:Fraction")

    assert fruits.names() == ["apple", "fig", "pear"]


def test_packages_of_others_publish_by_entry_point(fruits: Registry, published: list[EntryPoint]) -> None:
    published.append(EntryPoint("lime", "decimal:Decimal", "orchard"))
    published.append(EntryPoint("ruby", "decimal:Context", "gems"))
    from decimal import Decimal

    assert fruits.names() == ["apple", "lime", "pear"]
    assert fruits.resolve("lime") is Decimal
    with pytest.raises(ConfigError, match="did you mean 'lime'"):
        fruits.resolve("lim")


def test_a_package_may_not_redefine_a_built_in_name(fruits: Registry, published: list[EntryPoint]) -> None:
    published.append(EntryPoint("apple", "decimal:Decimal", "orchard"))

    with pytest.raises(ConfigError, match="an installed package redefines the built-in fruit 'apple'; rename it there"):
        fruits.resolve("pear")


@pytest.mark.parametrize("names", [registry.policies, registry.storage_backends], ids=lambda names: names.kind)
def test_every_built_in_name_leads_somewhere(published: list[EntryPoint], names: Registry) -> None:
    for name in names.names():
        assert isinstance(names.resolve(name), type)


def test_policies_go_by_their_own_names(published: list[EntryPoint]) -> None:
    names = registry.policies.names()
    assert {"d2o", "full", "quest", "s3fifo", "snapkv"} <= set(names)
    assert names == sorted(names)
    for name in names:
        assert registry.policies.resolve(name).name == name


def test_entry_points_are_read_under_the_documented_groups() -> None:
    assert registry.policies.group == "kvtier.policies"
    assert registry.storage_backends.group == "kvtier.storage_backends"
    assert registry.entry_points is importlib.metadata.entry_points
