"""Settings of the tiers: the same from a dict, a file and the environment, and strict about every key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvtier.config import StoreConfig, TierConfig, load_config
from kvtier.errors import ConfigError

HOST = {"name": "host", "backend": "host", "capacity": "256MiB"}
NVME = {"name": "nvme", "backend": "spill", "path": "/data/kv", "capacity": "8GiB"}
TOML = """
page_tokens = 32
block_tokens = 128

[[tiers]]
name = "host"
backend = "host"
capacity = "256MiB"

[[tiers]]
name = "nvme"
backend = "spill"
path = "/data/kv"
capacity = 8589934592
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVTIER_PAGE_TOKENS", "KVTIER_BLOCK_TOKENS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvtier.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


def test_a_dict_is_read_with_sizes_as_text() -> None:
    config = load_config({"tiers": [HOST, NVME]})

    assert config.tiers == (
        TierConfig(name="host", backend="host", capacity=256 << 20),
        TierConfig(name="nvme", backend="spill", capacity=8 << 30, path=Path("/data/kv")),
    )
    assert (config.page_tokens, config.block_tokens) == (16, 64)


def test_a_file_says_the_same_as_a_dict(file: Path) -> None:
    expected = load_config({"tiers": [HOST, NVME], "page_tokens": 32, "block_tokens": 128})

    assert load_config(file) == load_config(str(file)) == expected


def test_a_ready_value_is_taken_as_it_is() -> None:
    config = StoreConfig(page_tokens=8)
    assert load_config(config) is config


def test_without_settings_the_host_gives_half_of_its_free_memory() -> None:
    config = load_config(None)

    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tier,) = config.tiers
    assert (tier.name, tier.backend, tier.path) == ("host", "host", None)
    assert 0.2 * free < tier.capacity < 0.8 * free


def test_the_environment_overrides_a_file_and_a_dict(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_PAGE_TOKENS", "8")
    monkeypatch.setenv("KVTIER_BLOCK_TOKENS", "24")

    for source in (file, {"tiers": [HOST], "page_tokens": 4}, None):
        config = load_config(source)
        assert (config.page_tokens, config.block_tokens) == (8, 24)


def test_a_bad_value_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_PAGE_TOKENS", "many")

    with pytest.raises(ConfigError, match=r"page_tokens: .*integer.*, got 'many'"):
        load_config({"tiers": [HOST]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tier": []},
            "tier: unknown key; allowed: block_tokens, chunk_tokens, durability, page_tokens, publish_bytes, read_only",
        ),
        (
            {"tiers": [HOST | {"size": 1}]},
            "tiers.0.size: unknown key; allowed: backend, capacity, name, path, segment_bytes, sessions",
        ),
        (
            {"tiers": [HOST, NVME | {"x": 1}]},
            "tiers.1.x: unknown key; allowed: backend, capacity, name, path, segment_bytes, sessions",
        ),
        ({"tiers": [HOST | {"capacity": "lots"}]}, "tiers.0.capacity: Value error, a size is an integer of bytes"),
        ({"tiers": [HOST | {"capacity": 0}]}, "tiers.0.capacity: Value error, a size must be at least 1 byte"),
        ({"tiers": [HOST | {"capacity": 1.5}]}, "tiers.0.capacity"),
        ({"tiers": [{"name": "host", "backend": "host"}]}, "tiers.0.capacity: Field required"),
        ({"tiers": [HOST | {"name": "gpu"}]}, "tiers.0.name: Input should be 'host' or 'nvme', got 'gpu'"),
        ({"tiers": [NVME, HOST]}, "tiers must be host, nvme or host then nvme, got nvme, host"),
        ({"tiers": [HOST, HOST]}, "tiers must be host, nvme or host then nvme, got host, host"),
        ({"tiers": [HOST | {"path": "/tmp/x"}]}, "a tier in host memory takes no path"),  # noqa: S108 - never opened
        (
            {"tiers": [{"name": "nvme", "backend": "spill", "capacity": 1}]},
            "a spill tier needs path, the directory of its file",
        ),
        ({"page_tokens": 0}, "page_tokens: Input should be greater than or equal to 1, got 0"),
        ({"block_tokens": 40}, "block_tokens must be a multiple of page_tokens (16), got 40"),
        ({"tiers": "host"}, "tiers: "),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(values)

    assert message in str(error.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"pages": 3, "page_tokens": -1})

    assert "pages: unknown key" in str(error.value)
    assert "page_tokens: " in str(error.value)


@pytest.mark.parametrize("source", [3, ["tiers"], 1.5])
def test_settings_come_from_known_kinds_of_sources(source: object) -> None:
    with pytest.raises(ConfigError, match=r"a dict, a path to a TOML file or None, got (int|list|float)"):
        load_config(source)  # type: ignore[arg-type]


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such file"):
        load_config(tmp_path / "none.toml")
    for content in (b"tiers = [", b"\xff\xfe\x00"):
        bad = tmp_path / "bad.toml"
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
            load_config(bad)


def test_settings_cannot_be_changed_afterwards() -> None:
    config = load_config({"tiers": [HOST]})

    with pytest.raises(ValueError, match="frozen"):
        config.page_tokens = 1
    with pytest.raises(ValueError, match="frozen"):
        config.tiers[0].capacity = 1


def test_the_dict_given_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_PAGE_TOKENS", "8")
    given: dict[str, Any] = {"tiers": [dict(HOST)]}
    load_config(given)
    assert given == {"tiers": [HOST]}
