"""The file of a saved session: any damage is refused, nothing half-built stays, and an old file outlives a failure."""

from __future__ import annotations

import errno
import json
import random
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from kvtier.core.draft_tree import DraftTree
from kvtier.core.memory import Memory
from kvtier.core.pages import NVME
from kvtier.core.saved.header import SavedHeader
from kvtier.core.saved.save import Seen, save_batch
from kvtier.core.session import Session
from kvtier.errors import CapacityError, ConfigError, PagesLostError, RecordFormatError, SessionStateError, StorageError
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.engines.posix import PosixEngine
from kvtier.storage_backends.wrappers import VerifiedSlots
from kvtier.testing.faults import FaultyEngine, FaultySlots, flip_bit, truncate_file
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import StepSource, open_memory

LAYOUT = small_layout(window=13)


def filled(memory: Memory, tokens: int = 41) -> Session:
    session = memory.session()
    StepSource(LAYOUT, rows=2).take(tokens).run(session)
    return session


@pytest.fixture
def memory() -> Iterator[Memory]:
    with closing(open_memory(LAYOUT)) as opened:
        yield opened


@pytest.fixture
def path(memory: Memory, tmp_path: Path) -> Path:
    """A file; the memory is empty again."""
    with filled(memory) as session:
        session.save(tmp_path / "session.kvs", model="m")
    return tmp_path / "session.kvs"


def refused(memory: Memory, path: Path, match: str | None = None, kind: type[Exception] = RecordFormatError) -> None:
    """A restoration fails and holds nothing."""
    with pytest.raises(kind, match=match):
        memory.restore(path, model="m")
    assert not any(count for ledger in memory.ledgers.values() for count in ledger.by_purpose.values())
    assert not any(group.store.table.live for group in memory.groups)


def test_a_flipped_bit_anywhere_is_refused(memory: Memory, path: Path) -> None:
    whole, rng = path.read_bytes(), random.Random(0)
    # Every field of the header, and bits all over the file, in padding, too.
    for at in [*range(0, 96, 3), *range(96, len(whole), 797), len(whole) - 1]:
        flip_bit(path, at * 8 + rng.randrange(8))
        refused(memory, path)
        path.write_bytes(whole)
    memory.restore(path, model="m")


def test_a_file_cut_anywhere_is_refused(memory: Memory, path: Path) -> None:
    size = path.stat().st_size
    for keep in [size - 1, *range(size - 4096, 0, -4096), 4095, 1, 0]:
        truncate_file(path, keep)
        refused(memory, path)


@pytest.mark.parametrize(
    ("policy", "budgets"),
    [
        ("quest(dense_layers=1)", {"read": 16}),
        ("adakv(window=2, kernel=3)", {"keep": 300}),
        ("h2o(recent=3)", {"keep": 300}),
        ("full", {"device": 400_000}),
    ],
)
def test_damage_in_any_extent_leaves_nothing_behind(policy: str, budgets: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "session.kvs"
    with closing(open_memory(LAYOUT, policy, **budgets)) as memory:
        with filled(memory, 400) as session:
            session.save(path, model="m")
        whole = path.read_bytes()
        (payload,) = struct.unpack_from("<Q", whole, 32)
        assert payload > 3 * 65536
        for extent in range(-(-payload // 65536)):
            flip_bit(path, 8 * (4096 + extent * 65536 + 77))
            refused(memory, path, f"extent {extent} of the payload is damaged")
            path.write_bytes(whole)
        memory.restore(path, model="m")


def test_a_longer_file_is_refused(memory: Memory, path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    refused(memory, path, "cut or extended")


def test_foreign_and_newer_files_are_refused(memory: Memory, path: Path) -> None:
    whole = path.read_bytes()
    newer = bytearray(whole)
    struct.pack_into("<H", newer, 16, 2)
    struct.pack_into("<Q", newer, 8, xxhash.xxh3_64_intdigest(bytes(newer[16:4096])))
    for data, match in ((b"PK\x03\x04" + bytes(9000), "magic"), (bytes(newer), "required version 1, got 2")):
        path.write_bytes(data)
        refused(memory, path, match)
    refused(memory, path.parent / "missing", "No such file", StorageError)
    refused(memory, path.parent, "cannot read the session", StorageError)


def described(path: Path) -> dict[str, object]:
    """The description of a file."""
    whole = path.read_bytes()
    payload, description = struct.unpack_from("<QQ", whole, 32)
    found: dict[str, object] = json.loads(whole[len(whole) - description :])
    assert payload % 4096 == 0
    return found


def rewrite(path: Path, description: dict[str, object]) -> None:
    """Put another description into a file, with right digests: what a liar would write."""
    whole = path.read_bytes()
    payload, length = struct.unpack_from("<QQ", whole, 32)
    text = json.dumps(description).encode()
    text += b" " * (-len(text) % 4096)
    header = SavedHeader(
        payload_bytes=payload,
        description_bytes=len(text),
        created_us=0,
        digests_digest=whole[48:64],
        description_digest=xxhash.xxh3_128_digest(text),
    )
    path.write_bytes(header.pack() + whole[4096 : len(whole) - length] + text)


LIES = {
    "an array beyond the file": ("rows", 0, 0, "pages", "shape", 0, 1 << 40),
    "a huge dimension": ("rows", 0, 2, "tail_keys", "shape", 1, 1 << 61),
    "an array at an odd place": ("rows", 0, 0, "positions", "at", 8),
    "another type": ("rows", 0, 0, "tail_keys", "dtype", "float32"),
    "a type there is not": ("rows", 0, 0, "tail_keys", "dtype", "complex64"),
    "text for a number": ("rows", 0, 0, "evicted", "7"),
    "a fork of itself": ("rows", 0, 0, {"kind": "same", "row": 0}),
    "pages of nobody": ("rows", 0, 0, "shared", {"row": 0, "columns": 1}),
    "a window that begins before its buffer": ("rows", 0, 1, "seen", 3),
    "another kind of layer": ("rows", 0, 1, {"kind": "same", "row": 1}),
    "fewer layers": ("rows", 0, []),
    "other columns": ("columns", 3),
    "a history of other rows": ("history", [[41, [[0, 41]]]]),
    "a word more": ("more", 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_contradicts_itself_is_refused_also_with_right_digests(lie: str, memory: Memory, path: Path) -> None:
    description = described(path)
    *places, last, value = LIES[lie]
    inner: object = description
    for place in places:
        inner = inner[place]  # type: ignore[index]
    inner[last] = value  # type: ignore[index]
    rewrite(path, description)
    refused(memory, path)


def test_a_rewritten_truth_is_taken(memory: Memory, path: Path) -> None:
    rewrite(path, described(path))
    memory.restore(path, model="m")


@pytest.mark.parametrize(
    ("policy", "budgets", "match"),
    [
        ("snapkv(window=3)", {"keep": 24}, "policies none, and here it is snapkv"),
        ("quest(dense_layers=0)", {"read": 16}, "policies none, and here it is quest"),
    ],
)
def test_another_policy_is_refused(path: Path, policy: str, budgets: dict[str, int], match: str) -> None:
    with closing(open_memory(LAYOUT, policy, **budgets)) as other:
        refused(other, path, match, ConfigError)


def test_other_parameters_budgets_models_and_layouts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "session.kvs"
    with closing(open_memory(LAYOUT, "snapkv(window=3)", keep=24)) as memory, filled(memory) as session:
        session.save(path, model="m")
        with pytest.raises(ConfigError, match="fingerprint m, and here it is none"):
            memory.restore(path)
    for policy, keep, match in (("snapkv(window=4)", 24, r"window=3.*window=4"), ("snapkv(window=3)", 25, "24.*25")):
        with closing(open_memory(LAYOUT, policy, keep=keep)) as other:
            refused(other, path, match, ConfigError)
    with closing(open_memory(small_layout(window=14), "snapkv(window=3)", keep=24)) as other:
        refused(other, path, "layer 1 was saved with window 13, and here it is 14", ConfigError)


def test_placement_and_the_device_budget_may_differ(path: Path) -> None:
    with closing(open_memory(LAYOUT, "full | arc", device=60_000)) as other:
        restored = other.restore(path, model="m")
        ledger = other.groups[0].ledger
        assert restored.length == 41
        assert ledger.peak <= 60_000


def test_a_budget_without_room_is_refused_and_nothing_is_held(tmp_path: Path) -> None:
    with closing(open_memory(LAYOUT)) as memory, filled(memory, 400) as session:
        session.save(tmp_path / "session.kvs", model="m")
    with closing(open_memory(LAYOUT, device=60_000, host="8KiB")) as other:
        refused(other, tmp_path / "session.kvs", "room|free", CapacityError)


def test_pages_of_every_tier_are_saved_in_little_memory_and_demoted_as_they_load(tmp_path: Path) -> None:
    path, source = tmp_path / "session.kvs", StepSource(LAYOUT, rows=2)
    tiers = {"device": 90_000, "host": "16KiB", "nvme": "16MiB", "path": tmp_path}
    with closing(open_memory(LAYOUT, **tiers)) as first, closing(open_memory(LAYOUT, **tiers)) as second:  # type: ignore[arg-type]
        session = first.session()
        for _ in range(6):
            source.take(40).run(session)
        held = first.groups[0].store.table.copy[NVME].sum()
        session.save(path)
        restored = second.restore(path)
        step = source.take(3)

        assert held > 0
        assert second.groups[0].store.table.copy[NVME].sum() > 0
        assert max(memory.groups[0].ledger.peak for memory in (first, second)) <= 90_000
        for mine, right in zip(step.run(restored), step.run(session), strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


def test_a_damaged_page_on_disk_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "saved" / "session.kvs"
    path.parent.mkdir()
    path.write_text("old")
    with closing(open_memory(LAYOUT, device=90_000, host="16KiB", nvme="16MiB", path=tmp_path)) as memory:
        session, source = memory.session(), StepSource(LAYOUT, rows=2)
        for _ in range(6):
            source.take(40).run(session)
        table, verified = memory.groups[0].store.table, memory.groups[0].store.lower.backends[NVME]
        assert isinstance(verified, VerifiedSlots)
        verified.inner = FaultySlots(verified.inner)
        only_there = np.flatnonzero(table.copy[NVME] & ~table.copy[:NVME].any(axis=0))
        verified.inner.flip_bit(int(table.slot[NVME][only_there[0]]), 5)
        with pytest.raises(PagesLostError, match="do not match their digest"):
            session.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["session.kvs"]
    assert path.read_text() == "old"


def save_through(engine: FaultyEngine, session: Session, path: Path) -> None:
    seen = Seen(session.length, session._history, recording=False)
    save_batch(path, session._batch, seen, model="m", attached={}, engine=engine)


@pytest.mark.parametrize("room", [0, 5000, 20_000])
def test_a_full_disk_leaves_the_old_file(room: int, memory: Memory, path: Path) -> None:
    engine, old = FaultyEngine(PosixEngine()), path.read_bytes()
    with filled(memory, 50) as session:
        engine.fill_disk(room)
        with pytest.raises(StorageError, match="cannot save the session"):
            save_through(engine, session, path)
        assert path.read_bytes() == old
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        session.save(path, model="m")
    assert memory.restore(path, model="m").length == 50


def test_a_failed_sync_leaves_the_old_file(memory: Memory, path: Path) -> None:
    engine, old = FaultyEngine(PosixEngine()), path.read_bytes()
    with filled(memory, 50) as session:
        engine.fail_syncs()
        with pytest.raises(StorageError, match="cannot save the session"):
            save_through(engine, session, path)
    assert path.read_bytes() == old
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_crash_before_the_name_is_given_leaves_the_old_file(
    memory: Memory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk at that moment is what a crash leaves: the old file, and one under another name."""
    seen: dict[str, bytes] = {}

    def look() -> None:
        seen.update({file.name: file.read_bytes() for file in path.parent.iterdir()})

    monkeypatch.setitem(failpoints.active, "whole-file.synced", look)
    old = path.read_bytes()
    with filled(memory, 50) as session:
        session.save(path, model="m")

    assert seen[path.name] == old
    (part,) = seen.keys() - {path.name}
    assert part.startswith(f".{path.name}.")
    assert seen[part] == path.read_bytes()


def test_what_cannot_be_saved_says_why(memory: Memory, tmp_path: Path) -> None:
    session, source = memory.session(), StepSource(LAYOUT, rows=1)
    step = source.take(9)
    session.append(0, step.keys[0], step.values[0], step.positions)
    with pytest.raises(SessionStateError, match="layer 1 has seen 0 of 9 columns"):
        session.save(tmp_path / "half")
    with filled(memory) as drafting:
        drafts = StepSource(LAYOUT, rows=drafting.rows)
        drafts.position = drafting.length
        draft = drafts.take(1)
        drafting.append(0, draft.keys[0], draft.values[0], draft.positions, tree=DraftTree.of([None]))
        with pytest.raises(SessionStateError, match="drafted tokens are pending"):
            drafting.save(tmp_path / "draft")
    with closing(open_memory(LAYOUT, "snapkv(window=3)", keep=24)) as other:
        prompting = other.session()
        prompting.expect(20)
        source.take(9).run(prompting)
        with pytest.raises(SessionStateError, match="a prompt is running"):
            prompting.save(tmp_path / "prompt")
    with filled(memory) as whole, pytest.raises(StorageError, match="cannot save the session"):
        whole.save(tmp_path / "nowhere" / "session.kvs")
    assert not any(tmp_path.iterdir())


def test_only_an_empty_session_is_loaded(memory: Memory, path: Path) -> None:
    with filled(memory) as session, pytest.raises(SessionStateError, match="only an empty session"):
        session.load(path, model="m")


def test_a_read_error_is_a_storage_error_and_holds_nothing(
    memory: Memory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> list[OSError]:
        return [OSError(errno.EIO, "broken")]

    monkeypatch.setattr(PosixEngine, "read", fail)
    refused(memory, path, "cannot read the session", StorageError)
