"""The public surface of the store: prefixes, tenants, layouts and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.core.chunks import KVChunk
from kvtier.core.prefix import ChunkMeta
from kvtier.core.store import open_store
from kvtier.errors import ConfigError, InputError
from kvtier.testing.stored_prompts import HOST_TIER, LAYOUT, assert_loaded, chunks_of, keys_and_values, nvme_tier, space

MIB = 1 << 20


def test_a_prefix_comes_back(store_config: dict[str, Any]) -> None:
    tokens = list(range(30))
    with open_store(store_config) as store:
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
    config = {"tiers": [HOST_TIER], "tenants": {"a": {"salt": "one"}, "b": {"salt": "two"}}}
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
    config = {"tiers": [HOST_TIER], "tenants": {"a": {"salt": "x"}, "b": {"salt": "y"}, "c": {}}}
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


def test_into_is_filled_in_place() -> None:
    tokens = list(range(24))
    with open_store({"tiers": [HOST_TIER]}) as store:
        space(store).put(tokens, chunks_of(tokens))
        k, v = torch.zeros(3, 2, 40, 4), torch.zeros(3, 2, 40, 6)
        with space(store).match(tokens) as hit:
            loaded = hit.load(into=KVChunk.split(k, v, 8))
            windows = hit.load(layers=[1], first_chunk=2)
        assert len(loaded) == 3
        assert torch.equal(k[:, :, :24], keys_and_values(tokens)[0])
        assert torch.equal(v[:, :, :24], keys_and_values(tokens)[1])
        assert not k[:, :, 24:].any()
        assert len(windows) == 1
        assert torch.equal(windows[0].k[0], keys_and_values(tokens)[0][1, :, 16:])


def test_wrong_arguments_say_so() -> None:
    tokens = list(range(24))
    chunks = chunks_of(tokens)
    with open_store({"tiers": [HOST_TIER]}) as store:
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


def test_layers_may_differ(store_config: dict[str, Any]) -> None:
    layers = (LAYOUT.layers[0], replace(LAYOUT.layers[1], key_dim=3, dtype="bfloat16", window=16))
    layout = replace(LAYOUT, layers=layers)
    k = [torch.randn(2, 16, 4), torch.randn(2, 16, 3).bfloat16()]
    v = [torch.randn(2, 16, 6), torch.randn(2, 16, 6).bfloat16()]
    with open_store(store_config) as store:
        one = store.namespace(model="m", layout=layout)
        one.put(range(16), KVChunk.split(k, v, 8))
        with one.match(range(16)) as hit:
            first, second = hit.load()
    for layer in range(2):
        assert torch.equal(torch.cat([first.k[layer], second.k[layer]], 1), k[layer])
        assert torch.equal(torch.cat([first.v[layer], second.v[layer]], 1), v[layer])


def test_a_model_is_told_from_others_by_anything() -> None:
    with open_store({"tiers": [HOST_TIER]}) as store:
        digests = {
            store.namespace(model=model, layout=LAYOUT, extra=extra).digest
            for model in ("m", b"m", ["m"], {"weights": "m"})
            for extra in (None, {"lora": "a"}, {"lora": "b"})
        }
        assert len(digests) == 12
        assert store.namespace(model="m", layout=LAYOUT).digest in digests


def test_settings_decide_the_chunk() -> None:
    with open_store({"tiers": [HOST_TIER], "chunk_tokens": 64}) as store:
        assert space(store).layout.chunk_tokens == 64
    with (
        open_store({"tiers": [HOST_TIER], "page_tokens": 1, "block_tokens": 3, "chunk_tokens": 9}) as store,
        pytest.raises(ConfigError, match="chunk_tokens must be a positive multiple of block_tokens"),
    ):
        space(store)


def test_settings_that_hold_no_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a store needs at least one tier, got none"):
        open_store({"tiers": []})
    with pytest.raises(ConfigError, match="the spill backend holds live sessions only"):
        open_store({"tiers": [HOST_TIER, nvme_tier(tmp_path, "spill")]})
    with pytest.raises(ConfigError, match=r"unknown record store 'hots'; known: files, host, segment; did"):
        open_store({"tiers": [HOST_TIER | {"backend": "hots"}]})
    path = tmp_path / "store.toml"
    path.write_text('[[tiers]]\nname = "host"\nbackend = "host"\ncapacity = "1MiB"\n', encoding="utf-8")
    with open_store(path) as store:
        assert store.stats().tiers["host"].capacity_bytes == MIB


def test_records_say_where_they_belong() -> None:
    tokens = list(range(16))
    with open_store({"tiers": [HOST_TIER]}) as store:
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
