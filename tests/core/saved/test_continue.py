"""A restored session goes on like the one that was never saved: the same bits, in every kind of sequence."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtier.core.kept import KeptSequence
from kvtier.core.memory import Memory
from kvtier.core.ragged import RaggedSequence
from kvtier.core.sequence import LayerSequence
from kvtier.core.session import Session
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import Step, StepSource, open_memory
from kvtier.types import KVLayout, Rope

SETUPS = {
    "full": {},
    "full, budget": {"device": 150_000},
    "snapkv(window=3, kernel=3) | quest(dense_layers=1)": {"keep": 24, "read": 16},
    "quest(dense_layers=0)": {"read": 12},
    "expected_attention(n_future=9, n_sink=2)": {"keep": 20},
    "adakv(window=2, kernel=3)": {"keep": 11},
    "adakv(window=2, kernel=3), budget": {"keep": 11, "device": 150_000},
    "d2o(sinks=1, recent=3) | quest(dense_layers=2)": {"keep": 14, "read": 16},
    "d2o(sinks=1, recent=3, when='step')": {"keep": 12},
    "h2o(recent=3)": {"keep": 12},
    "tova": {"keep": 11},
    "streamingllm(sinks=2, positions='compact')": {"keep": 10},
}


def layout_of(dtype: str) -> KVLayout:
    """Three layers, the middle one sliding."""
    plain = small_layout(window=13, rope=Rope(frequencies=(1.0, 0.1)))
    return replace(plain, layers=tuple(replace(layer, dtype=dtype) for layer in plain.layers))


def memory_of(name: str, dtype: str) -> Memory:
    return open_memory(layout_of(dtype), name.removesuffix(", budget"), **SETUPS[name])


def lived(source: StepSource, session: Session) -> None:
    """A prompt that beams share, steps in which they part, another prompt, more steps."""
    source.take(37, equal=True).run(session)
    for _ in range(9):
        source.take(1).run(session)
    session.reorder([1, 0, 1])
    source.take(9).run(session)
    for _ in range(3):
        source.take(1).run(session)


def later(source: StepSource) -> list[Step]:
    return [source.take(tokens) for tokens in (1, 1, 1, 1, 21, 1, 1, 1)]


def outputs(steps: list[Step], session: Session) -> list[torch.Tensor]:
    return [out for step in steps for out in step.run(session)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETUPS)
def test_a_restored_session_gives_the_same_bits(name: str, dtype: str, tmp_path: Path) -> None:
    source = StepSource(layout_of(dtype), rows=3)
    with closing(memory_of(name, dtype)) as first, closing(memory_of(name, dtype)) as second:
        session = first.session()
        lived(source, session)
        size = session.save(tmp_path / "session.kvs", model="a model")
        restored = second.restore(tmp_path / "session.kvs", model="a model")
        steps = later(source)

        assert size == (tmp_path / "session.kvs").stat().st_size
        assert (restored.length, restored.rows, restored.croppable) == (session.length, 3, session.croppable)
        for mine, right in zip(outputs(steps, restored), outputs(steps, session), strict=True):
            assert torch.equal(mine, right)
        assert all(ledger.in_use <= (ledger.limit or ledger.in_use) for ledger in second.ledgers.values())
        restored.close()
        assert all(not any(ledger.by_purpose.values()) for ledger in second.ledgers.values())


@pytest.mark.parametrize("name", ["full", "adakv(window=2, kernel=3)"])
def test_saving_what_was_restored_gives_the_same_file(name: str, tmp_path: Path) -> None:
    """But for the time in the header: nothing is lost, and nothing is added."""
    with closing(memory_of(name, "float32")) as first, closing(memory_of(name, "float32")) as second:
        session = first.session()
        lived(StepSource(layout_of("float32"), rows=3), session)
        session.save(tmp_path / "one")
        second.restore(tmp_path / "one").save(tmp_path / "two")

    one, two = ((tmp_path / file).read_bytes() for file in ("one", "two"))
    assert one[4096:] == two[4096:]


def test_rows_that_shared_pages_share_them_again(tmp_path: Path) -> None:
    with closing(memory_of("full", "float32")) as first, closing(memory_of("full", "float32")) as second:
        session, source = first.session(), StepSource(layout_of("float32"), rows=3)
        lived(source, session)
        session.reorder([1, 0, 1])
        session.save(tmp_path / "session.kvs")
        restored = second.restore(tmp_path / "session.kvs")
        held = [memory.groups[0].store.table.live for memory in (first, second)]

        assert held[0] == held[1]
        versions = [row[0].version for row in restored._batch.rows]
        assert versions[0] is versions[2]
        assert versions[0] is not versions[1]


def test_every_kind_of_sequence_comes_back(tmp_path: Path) -> None:
    kinds = {"adakv(window=2, kernel=3)": RaggedSequence, "h2o(recent=3)": KeptSequence, "full": LayerSequence}
    for name, kind in kinds.items():
        with closing(memory_of(name, "float32")) as memory:
            session = memory.session()
            lived(StepSource(layout_of("float32"), rows=3), session)
            session.save(tmp_path / "session.kvs")
            session.close()
            assert isinstance(memory.restore(tmp_path / "session.kvs")._batch.rows[0][0], kind)


def test_an_empty_session_and_what_is_attached_come_back(tmp_path: Path) -> None:
    with closing(open_memory()) as memory:
        ids = torch.arange(7)[None]
        memory.session().save(tmp_path / "empty", attached={"ids": ids, "none": ids[:, :0]})
        session = memory.session()
        attached = session.load(tmp_path / "empty")

        assert torch.equal(attached["ids"], ids)
        assert attached["none"].shape == (1, 0)
        assert (session.rows, session.length) == (0, 0)
        StepSource(rows=1).take(9).run(session)


def test_sequences_that_were_cropped_to_nothing_come_back(tmp_path: Path) -> None:
    for name in ("quest(dense_layers=0)", "adakv(window=2, kernel=3)", "tova"):
        with closing(memory_of(name, "float32")) as memory, memory.session() as session:
            StepSource(layout_of("float32"), rows=2).take(9).run(session)
            session.crop(session.croppable)
            session.save(tmp_path / "session.kvs")
            restored = memory.restore(tmp_path / "session.kvs")
            later = StepSource(layout_of("float32"), rows=2, seed=1)
            later.position = 9
            step = later.take(1)
            for mine, right in zip(step.run(restored), step.run(session), strict=True):
                torch.testing.assert_close(mine, right)


def test_padding_crops_and_a_recorded_past_come_back(tmp_path: Path) -> None:
    layout = small_layout(window=13)
    with closing(open_memory(layout)) as first, closing(open_memory(layout)) as second:
        session, source = first.session(), StepSource(layout, rows=2)
        session.record_past(True)
        source.take(24).padded([slice(0, 24), slice(5, 24)], [0, 0]).run(session)
        session.save(tmp_path / "session.kvs")
        restored = second.restore(tmp_path / "session.kvs")
        for one in (session, restored):
            one.crop(20)
        step = StepSource(layout, rows=2, seed=1).take(3).padded([slice(0, 3), slice(0, 3)], [4, 0])
        for mine, right in zip(step.run(restored), step.run(session), strict=True):
            assert torch.equal(mine, right)


def test_another_process_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    name, source = "snapkv(window=3, kernel=3) | quest(dense_layers=1)", StepSource(layout_of("float32"), rows=3)
    with closing(memory_of(name, "float32")) as memory:
        session = memory.session()
        lived(source, session)
        session.save(tmp_path / "session.kvs")
        right = outputs(later(source), session)

    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, test_continue as here\n"
        "source = here.StepSource(here.layout_of('float32'), rows=3)\n"
        f"memory = here.memory_of({name!r}, 'float32')\n"
        "with memory.session() as other:\n    here.lived(source, other)\n"
        f"restored = memory.restore({str(tmp_path / 'session.kvs')!r})\n"
        "print(*[out.double().sum().item().hex() for out in here.outputs(here.later(source), restored)])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ}, timeout=120
    )
    assert run.stdout.split() == [out.double().sum().item().hex() for out in right]
