"""A store used by others: processes, threads, read-only openings, and once it is closed."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvtier.core.store import open_store
from kvtier.errors import StorageError
from kvtier.testing.stored_prompts import HOST_TIER, assert_loaded, chunks_of, nvme_tier, space


@pytest.mark.parametrize("backend", ["segment", "files"])
def test_another_process_finds_it(tmp_path: Path, backend: str) -> None:
    tokens = list(range(24))
    config = {"tiers": [HOST_TIER, nvme_tier(tmp_path / "store", backend)]}
    script = (
        "import json, sys; import kvtier\n"
        "from kvtier.types import KVLayout\n"
        "layout = KVLayout.uniform(num_layers=3, num_kv_heads=2, key_dim=4, value_dim=6, dtype='float32', "
        "page_tokens=2, block_tokens=4, chunk_tokens=8)\n"
        "with kvtier.open_store(json.loads(sys.argv[1])) as store:\n"
        "    space = store.namespace(model='model', layout=layout)\n"
        "    with space.match(list(range(24))) as hit:\n"
        "        print(json.dumps([hit.tokens, [chunk.k.sum().item() for chunk in hit.load()]]))\n"
    )
    with open_store(config) as store:
        space(store).put(tokens, chunks_of(tokens))

    done = subprocess.run(
        [sys.executable, "-P", "-c", script, json.dumps(config)], capture_output=True, text=True, check=True
    )

    assert json.loads(done.stdout) == [24, [chunk.k.sum().item() for chunk in chunks_of(tokens)]]  # type: ignore[union-attr]


def test_a_directory_belongs_to_one_writer(tmp_path: Path) -> None:
    config = {"tiers": [nvme_tier(tmp_path / "store")]}
    with open_store(config), pytest.raises(StorageError, match=str(tmp_path)):
        open_store({"tiers": [HOST_TIER, *config["tiers"]]})
    with open_store(config) as store:
        assert store.stats().records == 0


def test_read_only_serves_and_changes_nothing(tmp_path: Path) -> None:
    tokens = list(range(16))
    config = {"tiers": [HOST_TIER, nvme_tier(tmp_path / "store")]}
    with open_store(config) as store:
        space(store).put(tokens, chunks_of(tokens))
    for _ in range(2):
        with open_store(config, read_only=True) as store, space(store).match(tokens) as hit:
            assert_loaded(hit.load(), tokens)
            report = space(store).put([5] * 8, chunks_of([5] * 8))
            assert (report.refused, report.reason) == (1, "the store was opened read-only")
            assert (store.clear(), space(store).delete(tokens)) == (0, 0)
            assert store.stats().tiers["host"].records == 2, "memory may still keep copies"


def test_many_threads_use_one_store(store_config: dict[str, Any]) -> None:
    prompts = [[n % 5] * 8 + list(range(n, n + 16)) for n in range(12)]
    with open_store(store_config) as store, ThreadPoolExecutor(4) as pool:
        one = space(store)

        def use(turn: int) -> int:
            tokens = prompts[turn * 7 % len(prompts)]
            with one.match(tokens) as hit:
                loaded = hit.load()
                assert_loaded(loaded, tokens)
            one.put(tokens, chunks_of(tokens)[len(loaded) :], first_chunk=len(loaded))
            if turn % 9 == 0:
                one.delete(tokens)
            return len(loaded)

        assert sum(pool.map(use, range(80))) > 0
        assert all(tier.leased_bytes == 0 for tier in store.stats().tiers.values())
        assert store.stats().short_loads == 0 or store.stats().loaded_tokens > 0


def test_a_closed_store_misses_and_refuses(store_config: dict[str, Any]) -> None:
    tokens = list(range(24))
    store = open_store(store_config)
    one = space(store)
    one.put(tokens, chunks_of(tokens))
    held = one.match(tokens)
    store.close()
    store.close()

    assert held.load() == []
    assert one.match(tokens).tokens == 0
    report = one.put(tokens, chunks_of(tokens))
    assert report.refused == 3
    assert report.reason
    assert (one.delete(tokens), store.clear()) == (0, 0)
    store.flush()
