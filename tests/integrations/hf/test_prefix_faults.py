"""Whatever happens to the store, generation goes on with the same tokens, and the report says what was lost."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import kvtier
from kvtier.core.store import Store
from kvtier.errors import PagesLostError, StorageError
from kvtier.integrations.hf import prefix
from kvtier.integrations.hf.patch import PatchHandle
from kvtier.storage_backends.records import ReadRequest
from kvtier.testing.faults import damage_files
from kvtier.testing.tiny_models import left_padded, tiny_model

SIZES: dict[str, Any] = {"page_tokens": 4, "block_tokens": 8, "chunk_tokens": 16}
HOST: dict[str, Any] = {"tiers": [{"name": "host", "backend": "host", "capacity": "64MiB"}], **SIZES}
LENGTHS = (160, 131)
PROMPT = left_padded(LENGTHS)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}


def on_disk(directory: Path, capacity: str = "64MiB") -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    tier = {"name": "nvme", "backend": "segment", "path": str(directory), "capacity": capacity}
    return {"tiers": [tier], **SIZES}


@pytest.fixture
def store() -> Iterator[Store]:
    with kvtier.open_store(HOST) as opened:
        yield opened


def generate(model: Any, handle: PatchHandle, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**PROMPT, **{**GREEDY, **options})
    assert handle.store is not None
    handle.store.flush()
    return tokens


class Losing:
    """The reads of a store, of which some find nothing although the records were there."""

    def __init__(self, store: Store, lost: set[int]) -> None:
        self.read_really, self.lost, self.count = store.records.read, lost, 0
        store.records.read = self  # type: ignore[method-assign,assignment]

    def __call__(self, requests: Sequence[ReadRequest]) -> list[bool]:
        found = self.read_really(requests)
        for place in range(len(found)):
            self.count += 1
            if self.count in self.lost:
                requests[place].into.fill_(0x5A)
                found[place] = False
        return found


@pytest.mark.parametrize("lost", [{1}, {9}, {3, 14, 30}, set(range(1, 400))], ids=["first", "ninth", "some", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_chunk_that_is_gone_is_computed(family: str, lost: set[int], store: Store) -> None:
    model = tiny_model(family)
    expected = model.generate(**PROMPT, **GREEDY)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(generate(model, handle), expected)
        Losing(store, lost)
        assert torch.equal(generate(model, handle), expected)
        assert torch.equal(generate(model, handle), expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_directory_is_computed_again_with_the_same_tokens(seed: int, tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    expected = model.generate(**PROMPT, **GREEDY)
    config = on_disk(tmp_path / "store")
    with kvtier.patch(model, "full", store=config) as handle:
        assert torch.equal(generate(model, handle), expected)
    rng = random.Random(seed)
    for damages in (1, 5, 40):
        for _ in range(damages):
            damage_files(tmp_path / "store", rng)
        with kvtier.patch(model, "full", store=config) as handle:
            assert torch.equal(generate(model, handle), expected)


_IN_A_NEW_PROCESS = """
import sys, torch, kvtier
from kvtier.testing.tiny_models import left_padded, tiny_model
model, prompt = tiny_model("mistral"), left_padded((160, 131))
tier = {"name": "nvme", "backend": "segment", "path": sys.argv[1], "capacity": "64MiB"}
store = {"tiers": [tier], "page_tokens": 4, "block_tokens": 8, "chunk_tokens": 16}
with kvtier.patch(model, "full", store=store) as handle:
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=10)
    print(tokens.tolist(), handle.report().prefix.tokens_saved)
"""


def test_a_new_process_finds_what_another_published(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    expected = model.generate(**PROMPT, **GREEDY)
    with kvtier.patch(model, "full", store=on_disk(tmp_path / "store")) as handle:
        generate(model, handle)
    command = [sys.executable, "-c", _IN_A_NEW_PROCESS, str(tmp_path / "store")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert told.strip() == f"{expected.tolist()} {128 + 29 + 128}"


def test_sessions_spill_into_the_segments_that_keep_their_prefixes(tmp_path: Path) -> None:
    model = tiny_model("gemma3", max_position_embeddings=2048)
    prompt = left_padded((1200, 900))
    expected = model.generate(**prompt, **GREEDY)
    for _ in range(2):
        with kvtier.patch(model, "full", store=on_disk(tmp_path / "store"), device=420_000) as handle:
            assert torch.equal(model.generate(**prompt, **GREEDY), expected)
            report = handle.report().to_dict()
        assert report["bytes"]["device"]["peak"] <= 420_000
        assert report["bytes"]["nvme"]["peak"] > 0
    assert report["prefix"]["tokens_saved"] > 2000


def test_a_read_only_store_serves_and_takes_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = model.generate(**PROMPT, **GREEDY)
    with kvtier.patch(model, "full", store=on_disk(tmp_path / "store")) as handle:
        generate(model, handle)
    config = {**on_disk(tmp_path / "store"), "read_only": True}
    longer = left_padded([250], seed=4)
    with kvtier.patch(model, "full", store=config) as handle:
        assert torch.equal(generate(model, handle), expected)
        report = handle.report().prefix  # type: ignore[attr-defined]
        assert report.tokens_saved > 250
        assert "read-only" in report.reason
        model.generate(**longer, **GREEDY)
        assert handle.report().prefix.chunks_published == 0  # type: ignore[attr-defined]


def test_a_store_too_small_for_a_prompt(tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = model.generate(**PROMPT, **GREEDY)
    host = {**HOST, "tiers": [{"name": "host", "backend": "host", "capacity": "64KiB"}]}
    with kvtier.open_store(host) as store:
        for _ in range(3):
            with kvtier.patch(model, "full", store=store) as handle:
                assert torch.equal(generate(model, handle), expected)
        assert store.stats().tiers["host"].held_bytes <= 64 << 10


def test_a_queue_too_small_for_a_prompt_publishes_it_piece_by_piece() -> None:
    model = tiny_model("gemma2")
    expected = model.generate(**PROMPT, **GREEDY)
    chunk = 16 * 2 * 2 * 2 * 16 * 4
    with (
        kvtier.open_store({**HOST, "publish_bytes": 4 * chunk}) as store,
        kvtier.patch(model, "full", store=store) as handle,
    ):
        assert torch.equal(generate(model, handle), expected)
        first = handle.report().prefix  # type: ignore[attr-defined]
        for _ in range(6):
            assert torch.equal(generate(model, handle), expected)
        last = handle.report().prefix  # type: ignore[attr-defined]
    assert 0 < first.chunks_published <= 18
    assert last.tokens_matched == 160 + 128


def test_a_store_without_room_in_its_queue_takes_nothing() -> None:
    model = tiny_model("llama")
    expected = model.generate(**PROMPT, **GREEDY)
    with kvtier.open_store({**HOST, "publish_bytes": 1}) as store, kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(generate(model, handle), expected)
        report = handle.report().prefix  # type: ignore[attr-defined]
    assert (report.chunks_published, report.chunks_refused) == (0, 18)


class Closing(BaseStreamer):
    """Closes a store when some tokens have been generated."""

    def __init__(self, store: Store, after: int) -> None:
        self.store, self.left = store, after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.store.close()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("after", [1, 2, 9])
def test_a_store_that_is_closed_meanwhile(after: int) -> None:
    model = tiny_model("llama")
    ids = left_padded([120])
    longer = {**GREEDY, "max_new_tokens": 40}
    expected = model.generate(**ids, **longer)
    store = kvtier.open_store(HOST)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(model.generate(**ids, **longer, streamer=Closing(store, after)), expected)
        assert "closed" in handle.report().prefix.reason  # type: ignore[attr-defined]
        assert torch.equal(model.generate(**ids, **longer), expected)
        assert handle.report().prefix.tokens_matched == 0  # type: ignore[attr-defined]


def test_a_publication_that_fails_is_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    expected = model.generate(**PROMPT, **GREEDY)

    def broken(*args: Any) -> Any:
        raise StorageError("the medium is gone")

    monkeypatch.setattr(store.records, "put", broken)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(generate(model, handle), expected)
        report = handle.report().prefix  # type: ignore[attr-defined]
    assert report.chunks_refused > 0
    assert "the medium is gone" in report.reason


def test_a_session_without_room_for_the_prefix_computes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtier.core.restore import Restoration
    from kvtier.errors import CapacityError

    def full(*args: Any) -> None:
        raise CapacityError("no room")

    model = tiny_model("llama")
    expected = model.generate(**PROMPT, **GREEDY)
    with kvtier.patch(model, "full", store=store) as handle:
        generate(model, handle)
        monkeypatch.setattr(Restoration, "append", full)
        assert torch.equal(generate(model, handle), expected)
        assert handle.report().prefix.tokens_saved == 0  # type: ignore[attr-defined]


def test_a_prefix_that_is_slower_to_load_is_computed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    prompt = left_padded([600])
    expected = model.generate(**prompt, **GREEDY)
    with kvtier.patch(model, "full", store=store) as handle:
        assert torch.equal(model.generate(**prompt, **GREEDY), expected)
        store.flush()
        assert handle.report().prefix.decision is None  # type: ignore[attr-defined]
        monkeypatch.setattr(type(store.rates[0]), "predict", lambda self, nbytes: 1e6 if nbytes else 0.0)
        assert torch.equal(model.generate(**prompt, **GREEDY), expected)
        report = handle.report().prefix  # type: ignore[attr-defined]
    assert (report.tokens_matched, report.tokens_saved) == (592, 0)
    assert report.decision.tokens == 0 < report.decision.recompute_seconds < report.decision.transfer_seconds


def test_recovery_restores_what_is_stored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtier.core.session import Session

    model = tiny_model("gpt_oss")
    expected = model.generate(**PROMPT, **GREEDY)
    attend, calls, widths = Session.attend, [0], list[int]()

    def losing(self: Session, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 9:
            raise PagesLostError("pages 3 and 4 of layer 1 are damaged; call handle.recover()")
        return attend(self, *args, **kwargs)

    # Before the first prompt: a model with a hook is another than one without.
    model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    # Nothing is known of the model's speed, so that all that is stored is worth loading.
    monkeypatch.setattr(prefix, "_LEAST_MEASURED", 10**9)
    with kvtier.patch(model, "full", store=store) as handle:
        monkeypatch.setattr(Session, "attend", losing)
        with pytest.raises(PagesLostError):
            model.generate(**PROMPT, **GREEDY)
        store.flush()
        widths.clear()
        cache = handle.recover()
        recovered = list(widths)
        ids = cache.input_ids
        assert ids is not None
        mask = torch.cat([PROMPT["attention_mask"], torch.ones(2, ids.shape[1] - 160, dtype=torch.long)], dim=1)
        done = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=170 - ids.shape[1], past_key_values=cache
        )
    assert torch.equal(done, expected)
    assert recovered == [160 + 3 - 157], "row 1 is stored up to column 157"


def test_threads_share_a_store_and_a_model(store: Store) -> None:
    model = tiny_model("llama")
    prompts = [left_padded([90 + 7 * index], seed=index % 3) for index in range(6)]
    expected = [model.generate(**prompt, **GREEDY) for prompt in prompts]
    got: dict[int, torch.Tensor] = {}
    with kvtier.patch(model, "full", store=store):

        def work(index: int) -> None:
            for _ in range(3):
                got[index] = model.generate(**prompts[index], **GREEDY)
                assert torch.equal(got[index], expected[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == len(prompts)
    assert all(torch.equal(got[index], expected[index]) for index in got)


def test_two_models_share_a_store(store: Store) -> None:
    models = [tiny_model("llama"), tiny_model("qwen3")]
    expected = [model.generate(**PROMPT, **GREEDY) for model in models]
    for _ in range(2):
        with kvtier.patch(models[0], "full", store=store), kvtier.patch(models[1], "full", store=store) as handle:
            for model, tokens in zip(models, expected, strict=True):
                assert torch.equal(generate(model, handle), tokens)
    assert store.stats().loaded_tokens > 0
