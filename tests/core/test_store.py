"""The public surface of the store, over memory and over segments: prefixes, tenants, leases, reports and settings."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvtier
from kvtier.core.chunks import KVChunk
from kvtier.core.namespace import Namespace
from kvtier.core.prefix import ChunkMeta
from kvtier.core.store import Store, open_store
from kvtier.errors import CapacityError, ConfigError, InputError, StorageError
from kvtier.storage_backends.memory import PinnedRegion
from kvtier.types import KVLayout

MIB = 1 << 20
LAYOUT = KVLayout.uniform(
    num_layers=3, num_kv_heads=2, key_dim=4, value_dim=6, dtype="float32", page_tokens=2, block_tokens=4, chunk_tokens=8
)
HOST = {"name": "host", "backend": "host", "capacity": 4 * MIB}


def nvme(path: Path, backend: str = "segment", **more: Any) -> dict[str, Any]:
    return {"name": "nvme", "backend": backend, "path": str(path), "capacity": 16 * MIB} | more


@pytest.fixture(params=["host", "segment", "files", "host+segment", "host+files"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Every kind of store."""
    tiers: list[dict[str, Any]] = [HOST] if "host" in request.param else []
    backend = request.param.split("+")[-1]
    if backend != "host":
        tiers.append(nvme(tmp_path / "store", backend))
    return {"tiers": tiers, "durability": "relaxed"}


def kv(tokens: list[int], layout: KVLayout = LAYOUT) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [L, Hk, T, Dk] and values that follow from the tokens before them, as a model's do."""
    shape = layout.layers[0]
    k = torch.empty(len(layout.layers), shape.num_kv_heads, len(tokens), shape.key_dim)
    v = torch.empty(len(layout.layers), shape.num_kv_heads, len(tokens), shape.value_dim)
    state = 1
    for place, token in enumerate(tokens):
        state = (state * 31 + token) % 10007
        k[:, :, place] = torch.arange(k[:, :, 0].numel()).view_as(k[:, :, 0]) + state
        v[:, :, place] = -torch.arange(v[:, :, 0].numel()).view_as(v[:, :, 0]) - state
    return k, v


def chunks_of(tokens: list[int]) -> list[KVChunk]:
    return KVChunk.split(*kv(tokens), LAYOUT.chunk_tokens)


def assert_loaded(chunks: list[KVChunk], tokens: list[int], layers: list[int] | None = None) -> None:
    """The chunks are the first ones of the tokens."""
    k, v = kv(tokens)
    chosen = [0, 1, 2] if layers is None else layers
    for number, chunk in enumerate(chunks):
        span = slice(number * 8, number * 8 + 8)
        for place, layer in enumerate(chosen):
            assert torch.equal(chunk.k[place], k[layer, :, span])
            assert torch.equal(chunk.v[place], v[layer, :, span])


def space(store: Store, tenant: str = "default", model: str = "model") -> Namespace:
    return store.namespace(model=model, layout=LAYOUT, tenant=tenant)


def test_a_prefix_comes_back(config: dict[str, Any]) -> None:
    tokens = list(range(30))
    with open_store(config) as store:
        assert space(store).put(tokens, chunks_of(tokens)) == (3, 0, 0, "", 0)
        with space(store).match([*tokens[:20], 99]) as hit:
            assert (hit.tokens, hit.stored_tokens, hit.decision) == (16, 16, None)
            assert_loaded(hit.load(), tokens)
            assert_loaded(hit.load(layers=[0, 2]), tokens, [0, 2])
        assert space(store).match([1, *tokens]).tokens == 0
        assert space(store, model="other").match(tokens).tokens == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_match_is_the_longest_stored_prefix(data: st.DataObject) -> None:
    """Against a set of prefixes that were put and not deleted, over a few branching prompts of several tenants."""
    token = st.integers(0, 1)
    prompts = st.lists(token, max_size=5).map(lambda branch: [bit for bit in branch for _ in range(8)])
    stored: set[tuple[str, tuple[int, ...]]] = set()
    config = {"tiers": [HOST], "tenants": {"a": {"salt": "one"}, "b": {"salt": "two"}}}
    with open_store(config) as store:
        for _ in range(data.draw(st.integers(1, 8), label="steps")):
            tenant = data.draw(st.sampled_from("abc"), label="tenant")
            tokens = data.draw(prompts, label="prompt")
            match data.draw(st.sampled_from(["put", "part", "delete", "clear"]), label="verb"):
                case "put":
                    first = 0
                case "part":
                    first = data.draw(st.integers(0, len(tokens) // 8), label="first")
                case "delete":
                    prefixes = {(tenant, tuple(tokens[: end + 8])) for end in range(0, len(tokens), 8)}
                    assert space(store, tenant).delete(tokens) == len(prefixes & stored)
                    stored -= prefixes
                    continue
                case _:
                    mine = {one for one in stored if one[0] == tenant}
                    assert store.clear(tenant) == len(mine)
                    stored -= mine
                    continue
            report = space(store, tenant).put(tokens, chunks_of(tokens)[first:], first_chunk=first)
            new = {(tenant, tuple(tokens[: end + 8])) for end in range(8 * first, len(tokens), 8)}
            assert (report.stored, report.existing) == (len(new - stored), len(new & stored))
            stored |= new
        for tenant in "abc":
            tokens = data.draw(prompts, label="asked")
            expected = 0
            while expected < len(tokens) and (tenant, tuple(tokens[: expected + 8])) in stored:
                expected += 8
            with space(store, tenant).match([*tokens, 7]) as hit:
                assert hit.tokens == expected
                assert_loaded(hit.load(), tokens)
        assert store.stats().records == len(stored)


def test_nothing_is_shared_between_salts() -> None:
    tokens = list(range(8))
    config = {"tiers": [HOST], "tenants": {"a": {"salt": "x"}, "b": {"salt": "y"}, "c": {}}}
    with open_store(config) as store:
        spaces = {tenant: space(store, tenant) for tenant in "abcd"}
        for count, one in enumerate(spaces.values()):
            found = [other for other in spaces.values() if other.match(tokens).tokens]
            assert found == list(spaces.values())[:count]
            one.put(tokens, chunks_of(tokens))
        assert len({one.digest for one in spaces.values()}) == 4
    with open_store(config | {"tenants": {"a": {"salt": "z"}}}) as store:
        assert space(store, "a").digest != spaces["a"].digest
        assert space(store, "c").digest == spaces["c"].digest


@pytest.mark.parametrize("backend", ["segment", "files"])
def test_another_process_finds_it(tmp_path: Path, backend: str) -> None:
    tokens = list(range(24))
    config = {"tiers": [HOST, nvme(tmp_path / "store", backend)]}
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
    config = {"tiers": [nvme(tmp_path / "store")]}
    with open_store(config), pytest.raises(StorageError, match=str(tmp_path)):
        open_store({"tiers": [HOST, *config["tiers"]]})
    with open_store(config) as store:
        assert store.stats().records == 0


def test_read_only_serves_and_changes_nothing(tmp_path: Path) -> None:
    tokens = list(range(16))
    config = {"tiers": [HOST, nvme(tmp_path / "store")]}
    with open_store(config) as store:
        space(store).put(tokens, chunks_of(tokens))
    for _ in range(2):
        with open_store(config, read_only=True) as store, space(store).match(tokens) as hit:
            assert_loaded(hit.load(), tokens)
            report = space(store).put([5] * 8, chunks_of([5] * 8))
            assert (report.refused, report.reason) == (1, "the store was opened read-only")
            assert (store.clear(), space(store).delete(tokens)) == (0, 0)
            assert store.stats().tiers["host"].records == 2, "memory may still keep copies"


def test_into_is_filled_in_place() -> None:
    tokens = list(range(24))
    with open_store({"tiers": [HOST]}) as store:
        space(store).put(tokens, chunks_of(tokens))
        k, v = torch.zeros(3, 2, 40, 4), torch.zeros(3, 2, 40, 6)
        with space(store).match(tokens) as hit:
            loaded = hit.load(into=KVChunk.split(k, v, 8))
            windows = hit.load(layers=[1], first_chunk=2)
        assert len(loaded) == 3
        assert torch.equal(k[:, :, :24], kv(tokens)[0])
        assert torch.equal(v[:, :, :24], kv(tokens)[1])
        assert not k[:, :, 24:].any()
        assert len(windows) == 1
        assert torch.equal(windows[0].k[0], kv(tokens)[0][1, :, 16:])


def test_wrong_arguments_say_so() -> None:
    tokens = list(range(24))
    chunks = chunks_of(tokens)
    with open_store({"tiers": [HOST]}) as store:
        one = space(store)
        with pytest.raises(InputError, match=r"8 tokens for each of the chunks 1 to 3, got 3 full chunks"):
            one.put(tokens, chunks, first_chunk=1)
        with pytest.raises(InputError, match="got 3 full chunks"):
            one.put(tokens, chunks, first_chunk=-1)
        bad = chunks[1]._replace(v=torch.zeros(3, 2, 8, 6, dtype=torch.float16))
        with pytest.raises(InputError, match=r"chunks\[1\]\.v\[0\] must be torch\.float32 .* got torch\.float16"):
            one.put(tokens, [chunks[0], bad])
        assert store.stats().records == 0, "nothing was stored"
        assert one.put(tokens, []) == (0, 0, 0, "", 0)
        one.put(tokens, chunks)
        with one.match(tokens) as hit:
            for layers in ([], [1, 0], [3], [-1], [1, 1]):
                with pytest.raises(InputError, match="layers must ascend within 0 to 2"):
                    hit.load(layers=layers)
            with pytest.raises(InputError, match="into must have at least 3 chunks, got 2"):
                hit.load(into=chunks[:2])
            with pytest.raises(InputError, match=r"into\[0\]\.k must have 2 layers, got 3"):
                hit.load(layers=[0, 1], into=chunks)
            with pytest.raises(InputError, match="first_chunk must be at least 0"):
                hit.load(first_chunk=-1)
        for tenant in ("", "é" * 33):
            with pytest.raises(ConfigError, match="tenant must be 1 to 64 bytes"):
                space(store, tenant)


def test_hits_are_leased_until_they_are_released() -> None:
    tokens = list(range(80))
    with open_store({"tiers": [HOST | {"capacity": 2 * MIB}]}) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        held = one.match(tokens, owner="me")
        assert store.stats().tiers["host"].leased_bytes > 0
        assert held.lease.owner == "me"
        for start in range(1000, 4000, 8):
            other = list(range(start, start + 8))
            one.put(other, chunks_of(other))
        assert_loaded(held.load(), tokens)
        assert len(held.load()) == 10
        held.release()
        held.release()
        assert store.stats().tiers["host"].leased_bytes == 0
        for start in range(4000, 8000, 8):
            other = list(range(start, start + 8))
            one.put(other, chunks_of(other))
        assert one.match(tokens).tokens < 80
        assert len(held.load()) < 10, "what is gone makes a load shorter"
        assert store.stats().short_loads == 1


def test_a_prompt_larger_than_the_store_keeps_its_beginning() -> None:
    tokens = list(range(4000))
    with open_store({"tiers": [HOST | {"capacity": 256 << 10}]}) as store:
        report = space(store).put(tokens, chunks_of(tokens))

        assert 0 < report.stored < 500
        assert report.stored + report.refused == 500
        assert "no room" in report.reason
        with space(store).match(tokens) as hit:
            assert hit.tokens == 8 * report.stored
            assert_loaded(hit.load(), tokens)
        assert store.stats().last_refusal == report.reason


def test_layers_may_differ(config: dict[str, Any]) -> None:
    layers = (LAYOUT.layers[0], replace(LAYOUT.layers[1], key_dim=3, dtype="bfloat16", window=16))
    layout = replace(LAYOUT, layers=layers)
    k = [torch.randn(2, 16, 4), torch.randn(2, 16, 3).bfloat16()]
    v = [torch.randn(2, 16, 6), torch.randn(2, 16, 6).bfloat16()]
    with open_store(config) as store:
        one = store.namespace(model="m", layout=layout)
        one.put(range(16), KVChunk.split(k, v, 8))
        with one.match(range(16)) as hit:
            first, second = hit.load()
    for layer in range(2):
        assert torch.equal(torch.cat([first.k[layer], second.k[layer]], 1), k[layer])
        assert torch.equal(torch.cat([first.v[layer], second.v[layer]], 1), v[layer])


def test_a_model_is_told_from_others_by_anything() -> None:
    with open_store({"tiers": [HOST]}) as store:
        digests = {
            store.namespace(model=model, layout=LAYOUT, extra=extra).digest
            for model in ("m", b"m", ["m"], {"weights": "m"})
            for extra in (None, {"lora": "a"}, {"lora": "b"})
        }
        assert len(digests) == 12
        assert store.namespace(model="m", layout=LAYOUT).digest in digests


def test_settings_decide_the_chunk() -> None:
    with open_store({"tiers": [HOST], "chunk_tokens": 64}) as store:
        assert space(store).layout.chunk_tokens == 64
    with (
        open_store({"tiers": [HOST], "page_tokens": 1, "block_tokens": 3, "chunk_tokens": 9}) as store,
        pytest.raises(ConfigError, match="chunk_tokens must be a positive multiple of block_tokens"),
    ):
        space(store)


def test_records_say_where_they_belong() -> None:
    tokens = list(range(16))
    with open_store({"tiers": [HOST]}) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        infos = list(store.records.scan())
        keys = one.keys(tokens)

        assert [info.key for info in infos] == keys
        assert {(info.namespace, info.tenant) for info in infos} == {(one.digest, "default")}
        assert [ChunkMeta.unpack(info.meta) for info in infos] == [
            ChunkMeta(0, 8, one.digest),
            ChunkMeta(1, 8, keys[0]),
        ]


def test_loading_is_weighed_against_computing() -> None:
    tokens = list(range(24))
    with open_store({"tiers": [HOST]}) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        with one.match(tokens, recompute=kvtier.RecomputeRate(tokens_per_second=1e12)) as hit:
            assert (hit.tokens, hit.stored_tokens) == (0, 24)
            assert hit.load() == []
            assert hit.decision is not None
            assert hit.decision.transfer_seconds > hit.decision.recompute_seconds
        with one.match(tokens, recompute=kvtier.RecomputeRate(tokens_per_second=1.0)) as hit:
            assert hit.tokens == 24
            assert len(hit.load()) == 3
        assert one.match([5], recompute=kvtier.RecomputeRate(tokens_per_second=1.0)).decision is None
        stats = store.stats()
        assert (stats.decisions, stats.declined) == (2, 1)
        assert stats.recompute_seconds == pytest.approx(24.0, rel=1e-3)
        assert stats.rates["host"].reads == 1


def test_stats_are_plain_numbers(config: dict[str, Any]) -> None:
    tokens = list(range(24))
    with open_store(config) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        one.put(tokens, chunks_of(tokens))
        with one.match([*tokens, *range(8)]) as hit:
            hit.load(layers=[0])
        stats = store.stats()

        assert json.loads(json.dumps(stats.to_dict())) == stats.to_dict()
        assert list(stats.tiers) == [tier["name"] for tier in config["tiers"]]
        assert (stats.records, stats.stored_chunks, stats.existing_chunks) == (3, 3, 3)
        assert (stats.matches, stats.hits, stats.requested_tokens, stats.matched_tokens) == (1, 1, 32, 24)
        assert (stats.loaded_tokens, stats.loaded_bytes) == (24, 3 * one.codec.payload_bytes // 3)
        assert stats.tenants["default"] >= 3 * one.codec.payload_bytes


def test_what_is_published_is_there_after_a_flush(config: dict[str, Any]) -> None:
    tokens = list(range(24))
    with open_store(config) as store:
        one = space(store)
        futures = [
            one.publish(tokens, chunks_of(tokens)[:1]),
            one.publish(tokens, chunks_of(tokens)[1:], first_chunk=1),
        ]
        store.flush()
        assert [future.result(0) for future in futures] == [(1, 0, 0, "", 0), (2, 0, 0, "", 0)]
        assert (one.match(tokens).tokens, store.stats().queued_bytes) == (24, 0)
        with pytest.raises(InputError):
            one.publish(tokens, chunks_of(tokens), first_chunk=1)
        last = one.publish([7] * 8, chunks_of([7] * 8))
    assert last.result(0).stored == 1, "close waits for what was published"


def test_a_full_queue_refuses_the_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(40))
    entered, go_on = threading.Event(), threading.Event()
    with open_store({"tiers": [HOST], "publish_bytes": 3 * 3 * 2 * 10 * 8 * 4}) as store:
        one = space(store)
        put = store.records.put

        def slow(records: Any) -> Any:
            entered.set()
            go_on.wait(60)
            return put(records)

        monkeypatch.setattr(store.records, "put", slow)
        first = one.publish(tokens, chunks_of(tokens)[:2])
        assert entered.wait(60)
        second = one.publish(tokens, chunks_of(tokens))
        third = one.publish(tokens, chunks_of(tokens))
        assert third.done()
        assert third.result() == (0, 0, 5, "more than 5.6 KiB would wait to be stored", 0)
        go_on.set()

        assert first.result(60).stored == 2
        assert second.result(60) == (0, 1, 4, "more than 5.6 KiB would wait to be stored", 0)
        assert store.stats().dropped_chunks == 9
    assert one.publish(tokens, chunks_of(tokens)).result(0).reason == "the store is closed"


def test_a_closed_store_misses_and_refuses(config: dict[str, Any]) -> None:
    tokens = list(range(24))
    store = open_store(config)
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


def test_no_memory_to_move_through_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_self: PinnedRegion, _size: int) -> None:
        raise CapacityError("required memory, which the system refused")

    tokens = list(range(24))
    with open_store({"tiers": [HOST]}) as store:
        one = space(store)
        one.put(tokens, chunks_of(tokens))
        store.staging.close()
        monkeypatch.setattr(PinnedRegion, "__init__", none_left)

        assert one.put([5] * 8, chunks_of([5] * 8)) == (0, 0, 1, "required memory, which the system refused", 0)
        with one.match(tokens) as hit:
            assert hit.load(layers=[0]) == []
            assert len(hit.load()) == 3, "whole chunks in memory need no way"


def test_many_threads_use_one_store(config: dict[str, Any]) -> None:
    prompts = [[n % 5] * 8 + list(range(n, n + 16)) for n in range(12)]
    with open_store(config) as store, ThreadPoolExecutor(4) as pool:
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


def test_settings_that_hold_no_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a store needs at least one tier, got none"):
        open_store({"tiers": []})
    with pytest.raises(ConfigError, match="the spill backend holds live sessions only"):
        open_store({"tiers": [HOST, nvme(tmp_path, "spill")]})
    with pytest.raises(ConfigError, match=r"unknown record store 'hots'; known: files, host, segment; did"):
        open_store({"tiers": [HOST | {"backend": "hots"}]})
    path = tmp_path / "store.toml"
    path.write_text('[[tiers]]\nname = "host"\nbackend = "host"\ncapacity = "1MiB"\n', encoding="utf-8")
    with open_store(path) as store:
        assert store.stats().tiers["host"].capacity_bytes == MIB
