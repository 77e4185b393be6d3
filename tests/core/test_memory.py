"""Opening a memory: groups, tiers and their shares, and nothing left behind when something is wrong."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.config import load_config
from kvtier.core.compose import policy
from kvtier.core.memory import Memory
from kvtier.core.pages import HOST, NVME
from kvtier.core.ring import WindowSequence
from kvtier.core.sequence import LayerSequence
from kvtier.errors import CompositionError, ConfigError, SessionStateError, StorageError
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import StepSource, open_memory
from kvtier.types import Budgets, KVLayout, LayerLayout

WIDE = LayerLayout(num_query_heads=8, num_kv_heads=4, key_dim=12, value_dim=8, dtype="float64")


def memory_of(layout: KVLayout, *, text: str = "full", tenant: str = "default", **tiers: Any) -> Memory:
    return Memory(layout, policy(text), Budgets(), load_config(tiers or None), tenant=tenant)


def test_layers_of_one_shape_share_a_group_and_windows_have_none() -> None:
    narrow, sliding = small_layout(window=5).layers[:2]
    layout = KVLayout(layers=(narrow, sliding, WIDE, narrow, WIDE), page_tokens=4, block_tokens=8, chunk_tokens=16)
    with closing(memory_of(layout)) as memory:
        assert [group.layers for group in memory.groups] == [(0, 3), (2, 4)]
        kinds = [type(memory.sequence(layer)) for layer in range(5)]
        assert kinds == [LayerSequence, WindowSequence, LayerSequence, LayerSequence, LayerSequence]


def test_tiers_are_shared_out_by_the_bytes_of_the_layers(tmp_path: Path) -> None:
    layout = KVLayout(layers=(small_layout().layers[0], WIDE), page_tokens=4, block_tokens=8, chunk_tokens=16)
    tiers = [
        {"name": "host", "backend": "host", "capacity": "1MiB"},
        {"name": "nvme", "backend": "spill", "capacity": "5MiB", "path": tmp_path},
    ]
    with closing(memory_of(layout, tiers=tiers)) as memory:
        reports = memory.tier_reports()

        assert 0.97 * (1 << 20) < reports["host"].capacity <= 1 << 20  # type: ignore[operator]
        assert 0.97 * (5 << 20) < reports["nvme"].capacity <= 5 << 20  # type: ignore[operator]
        host = [group.store.lower.backends[HOST].capacity_bytes for group in memory.groups]
        assert host[1] / host[0] == pytest.approx(WIDE.token_bytes / layout.layers[0].token_bytes, rel=0.05)
        assert all(set(group.store.lower.backends) == {HOST, NVME} for group in memory.groups)


def test_reports_name_the_tiers_there_are() -> None:
    with closing(open_memory(host=None)) as memory:
        assert set(memory.tier_reports()) == {"device"}
        assert memory.tier_reports()["device"].capacity is None
    with closing(open_memory(device=1 << 20)) as memory:
        assert set(memory.tier_reports()) == {"device", "host"}
        assert memory.tier_reports()["device"].capacity == 1 << 20


def test_every_tenant_spills_into_a_directory_of_its_own(tmp_path: Path) -> None:
    tiers = [{"name": "nvme", "backend": "spill", "capacity": "1MiB", "path": tmp_path}]
    with closing(memory_of(small_layout(), tenant="team-a", tiers=tiers)) as one:
        with closing(memory_of(small_layout(), tenant="team-b", tiers=tiers)):
            assert {path.name for path in tmp_path.iterdir()} == {"team-a", "team-b"}
        assert one.tenant == one.session().report().tenant == "team-a"
    assert all(not list(path.iterdir()) for path in tmp_path.iterdir()), "spill files leave no name behind"


@pytest.mark.parametrize("tenant", ["", ".hidden", "a/b", "..", "a b", "a\0"])
def test_a_tenant_is_a_plain_name(tenant: str) -> None:
    with pytest.raises(ConfigError, match=r"tenant must be letters, digits, '-', '_' or '\.', got"):
        memory_of(small_layout(), tenant=tenant)


@pytest.mark.parametrize("devices", [0, 2, 4])
def test_every_layer_has_a_device(devices: int) -> None:
    with pytest.raises(ConfigError, match=rf"devices must name one per layer \(3\), got {devices}"):
        Memory(small_layout(), policy("full"), Budgets(), None, [torch.device("cpu")] * devices)


@pytest.mark.parametrize(
    ("tier", "error", "message"),
    [
        ({"capacity": 100}, ConfigError, r"the host tier must hold at least one page \(320 B\), got 100 B for it"),
        ({"backend": "tape"}, ConfigError, "unknown storage backend 'tape'; known: host, spill"),
        (
            {"name": "nvme", "backend": "spill", "path": "/no/such"},
            StorageError,
            "needs an existing directory, got /no",
        ),
    ],
    ids=["too small", "unknown backend", "no directory"],
)
def test_a_tier_that_cannot_open_leaves_nothing_behind(
    tier: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = set(threading.enumerate())

    with pytest.raises(error, match=message):
        memory_of(small_layout(), tiers=[{"name": "host", "backend": "host", "capacity": "1MiB"} | tier])

    assert set(threading.enumerate()) <= before


def test_a_policy_that_does_not_fit_fails_before_a_tier_is_opened(tmp_path: Path) -> None:
    tiers = [{"name": "nvme", "backend": "spill", "capacity": "1MiB", "path": tmp_path}]

    with pytest.raises(CompositionError, match="quest needs read"):
        memory_of(small_layout(), text="quest", tiers=tiers)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "rows", "chunk"), [(None, 1, None), (160_000, 1, 120), (160_000, 4, 24), (2_000, 1, 8), (160_000, 99, 8)]
)
def test_a_prefill_chunk_is_whole_blocks_and_an_eighth_of_the_budget(
    device: int | None, rows: int, chunk: int | None
) -> None:
    with closing(open_memory(device=device)) as memory:
        assert memory.max_prefill_chunk(rows) == chunk


def test_closing_a_session_gives_its_device_memory_back() -> None:
    with closing(open_memory(device=400_000)) as memory:
        session, other = memory.session(), memory.session()
        StepSource(rows=2).take(90).run(session)
        StepSource(seed=1).take(20).run(other)
        held = memory.tier_reports()["device"].allocated
        session.close()
        assert memory.tier_reports()["device"].allocated < held
        other.close()
        assert memory.tier_reports()["device"].allocated == 0
        assert all(ledger.reserved == 0 for ledger in memory.ledgers.values())


def test_close_ends_the_threads_and_the_tiers(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    memory = open_memory(device=150_000, host="32KiB", nvme="4MiB", path=tmp_path)
    source, session = StepSource(), memory.session()
    for _ in range(12):
        source.take(40).run(session)
    assert memory.moved()["spilled"] > 0
    session.close()
    memory.close()
    memory.close()

    assert set(threading.enumerate()) <= before
    with pytest.raises(SessionStateError, match="closed"):
        memory.session()
