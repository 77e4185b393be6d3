"""Tiers and budgets from the words of a command line."""

from pathlib import Path

import pytest

from kvtier.cli.tiers import check_budgets, peak_bytes, store_of
from kvtier.config import load_config
from kvtier.core.compose import policy
from kvtier.errors import ConfigError, InputError


def test_no_words_leave_the_default() -> None:
    assert store_of(None, None, None) is None


def test_host_comes_before_nvme(tmp_path: Path) -> None:
    config = load_config(store_of("1MiB", tmp_path, "2MiB"))

    assert [(tier.name, tier.capacity, tier.path) for tier in config.tiers] == [
        ("host", 2**20, None),
        ("nvme", 2**21, tmp_path),
    ]


def test_nvme_alone(tmp_path: Path) -> None:
    config = load_config(store_of(None, tmp_path, "2MiB"))

    assert [tier.name for tier in config.tiers] == ["nvme"]


def test_a_directory_of_prefixes_takes_the_nvme_tier(tmp_path: Path) -> None:
    config = load_config(store_of("1MiB", None, None, prefixes=tmp_path))
    sized = load_config(store_of(None, None, None, prefixes=tmp_path, prefix_bytes="64MiB"))

    assert [(tier.name, tier.backend, tier.capacity) for tier in config.tiers] == [
        ("host", "host", 2**20),
        ("nvme", "segment", 2**33),
    ]
    assert sized.tiers[0].capacity == 2**26


def test_prefixes_need_a_directory_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--store-bytes SIZE is the size of --store DIR"):
        store_of(None, None, None, prefix_bytes="1GiB")
    with pytest.raises(InputError, match="both take the NVMe tier"):
        store_of(None, tmp_path, "1GiB", prefixes=tmp_path)


@pytest.mark.parametrize("words", [(None, Path(), None), (None, None, "1GiB")])
def test_directory_and_size_go_together(words: tuple[None, Path | None, str | None]) -> None:
    with pytest.raises(InputError, match="go together"):
        store_of(*words)


@pytest.mark.parametrize("size", ["0", "-1GiB", "much", "1 furlong"])
def test_a_size_that_cannot_be_read(size: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        store_of(size, None, None)


@pytest.mark.parametrize(
    ("text", "keep", "read", "said"),
    [
        ("snapkv", 0, None, "keep must be from 1 to the 100 tokens of the prompt, got 0"),
        ("snapkv", 101, None, "keep must be from 1 to the 100 tokens of the prompt, got 101"),
        ("quest", None, 101, "read must be from 1 to the 100 tokens of the prompt, got 101"),
        ("snapkv(keep=512) | quest", None, 90, "keep must be from 1 to the 100 tokens of the prompt, got 512"),
    ],
)
def test_budgets_beyond_the_prompt(text: str, keep: int | None, read: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_budgets(policy(text), keep, read, 100)


def test_budgets_within_the_prompt_pass() -> None:
    check_budgets(policy("snapkv | quest"), 100, 1, 100)
    check_budgets(policy("full"), None, None, 1)


def test_missing_tiers_hold_nothing() -> None:
    assert peak_bytes({"bytes": {"device": {"peak": 7, "used": 1}}}) == {"device": 7, "host": 0, "nvme": 0}
