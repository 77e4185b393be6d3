"""A cache saved to a file goes on where it was, in another handle over another copy of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.errors import ConfigError, RecordFormatError, SessionStateError, StorageError
from kvtier.integrations.hf.fingerprint import fingerprint
from kvtier.integrations.hf.layout import layout_of
from kvtier.integrations.hf.patch import PatchHandle, attach, patch
from kvtier.testing.faults import flip_bit
from kvtier.testing.oracles import PlainMemory
from kvtier.testing.tiny_models import left_padded, tiny_model

PROMPT = left_padded([40, 23])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
STORE = {"tiers": [{"name": "host", "backend": "host", "capacity": "32MiB"}], "page_tokens": 4, "block_tokens": 8}


def turn(handle: PatchHandle, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Go on with ``ids`` behind what a cache was fed."""
    fed = cache.input_ids
    mask = torch.ones(2, fed.shape[1] + ids.shape[1], dtype=torch.long)
    mask[:, :40] = PROMPT["attention_mask"]
    output = handle.model.generate(torch.cat([fed, ids], dim=1), attention_mask=mask, past_key_values=cache, **GREEDY)
    return output[:, fed.shape[1] :]


@pytest.mark.parametrize(
    ("family", "policy", "budgets"),
    [
        ("llama", "full", {"device": "400KiB"}),
        ("llama", "snapkv(window=8)", {"keep": 24}),
        ("llama", "h2o(recent=4)", {"keep": 24}),
        ("gemma3", "adakv(window=8)", {"keep": 24}),
    ],
)
def test_another_turn_is_that_of_the_cache_that_was_never_saved(
    family: str, policy: str, budgets: dict[str, Any], tmp_path: Path
) -> None:
    question = torch.tensor([[5, 9, 4, 11, 7], [8, 3, 6, 2, 10]])
    with patch(tiny_model(family), policy, store=STORE, **budgets) as handle:
        cache = handle.new_cache()
        handle.model.generate(**PROMPT, **GREEDY, past_key_values=cache)
        size = handle.save(tmp_path / "cache.kvs", cache)
        fed = cache.input_ids
        right = turn(handle, cache, question)
    assert size == (tmp_path / "cache.kvs").stat().st_size

    with patch(tiny_model(family), policy, store=STORE, **budgets) as handle:
        restored = handle.restore(tmp_path / "cache.kvs")
        assert fed is not None
        assert torch.equal(restored.input_ids, fed)
        assert torch.equal(turn(handle, restored, question), right)


def test_files_of_other_models_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvs"
    with patch(tiny_model("llama"), "full", store=STORE) as handle:
        cache = handle.new_cache()
        handle.model.generate(**PROMPT, **GREEDY, past_key_values=cache)
        handle.save(path, cache)
        cache.session.save(tmp_path / "session.kvs")
        damaged = tmp_path / "damaged.kvs"
        damaged.write_bytes(path.read_bytes())
        flip_bit(damaged, 8 * 5000)
        with pytest.raises(RecordFormatError, match="cannot be restored"):
            handle.restore(damaged)
        with torch.no_grad():
            handle.model.lm_head.weight[0, 0] += 1
        with pytest.raises(ConfigError, match="model fingerprint"):
            handle.restore(path)
        with pytest.raises(ConfigError, match="model fingerprint"):
            handle.restore(tmp_path / "session.kvs")
        with pytest.raises(StorageError, match="No such file"):
            handle.restore(tmp_path / "missing")
        assert handle.report().to_dict()["tokens"] > 0
    with pytest.raises(SessionStateError, match="removed"):
        handle.restore(path)


def test_what_is_no_cache_of_ours_is_told_apart(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with patch(model, "full", store=STORE) as handle:
        handle.new_cache().session.save(tmp_path / "session.kvs", model=fingerprint(model))
        with pytest.raises(RecordFormatError, match="no cache of a patched model"):
            handle.restore(tmp_path / "session.kvs")
    with attach(model, PlainMemory(layout_of(model))) as handle, pytest.raises(SessionStateError, match="own memory"):
        handle.save(tmp_path / "plain.kvs", handle.new_cache())
