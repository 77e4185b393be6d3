"""The bytes a session reports are the bytes it holds, and no step passes the device budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kvtier.config import load_config
from kvtier.core.compose import policy
from kvtier.core.memory import Memory
from kvtier.core.session import Session
from kvtier.kernels import scratch
from kvtier.testing.oracles import PlainSession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import StepSource, open_memory
from kvtier.types import Budgets, KVLayout, LayerLayout

POLICIES = [
    "full",
    "quest(dense_layers=1, read=32)",
    "snapkv(window=4, keep=24)",
    "snapkv(window=4, keep=24) | quest(dense_layers=0, read=16)",
]
LONG_PROMPT = 1200
BUDGETS = dict(zip(POLICIES, (160_000, 400_000, 160_000, 600_000), strict=True))  # sketches of a long prompt are kept


Count = Callable[[Memory], dict[str, int]]


@pytest.fixture
def held() -> Iterator[Count]:
    """Bytes of the storages of all tensors made in this test: floats are the device's, bytes the host's."""
    gc.collect()
    gc.freeze()

    def count(memory: Memory) -> dict[str, int]:
        for group in memory.groups:
            group.store.settle()
        scratch.release()
        gc.collect()
        new = [found for found in gc.get_objects() if type(found) is torch.Tensor]

        def size(dtype: torch.dtype) -> int:
            storages = [one.untyped_storage() for one in new if one.dtype == dtype]
            return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

        return {"device": size(torch.float64), "host": size(torch.uint8)}

    yield count
    gc.unfreeze()


def reported(session: Session) -> dict[str, int]:
    report = session.report().bytes
    return {tier: report[tier].allocated for tier in ("device", "host")}


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize(("device", "window"), [(None, None), (400_000, 9), (160_000, None)])
def test_reported_bytes_are_those_of_the_live_tensors(
    held: Count, text: str, device: int | None, window: int | None
) -> None:
    with closing(open_memory(small_layout(window), text, device=device)) as memory:
        source = StepSource(memory.layout, rows=2)
        session = memory.session()
        source.take(120).run(session)
        assert held(memory) == reported(session)
        for tokens in [1] * 12 + [30, 1]:
            source.take(tokens).run(session)
        assert held(memory) == reported(session)
        twin = session.fork()
        source.take(9).run(twin)
        assert held(memory) == reported(session)
        session.reorder([1, 1])
        session.crop(min(2, session.croppable))
        assert held(memory) == reported(session)
        twin.close()
        assert held(memory) == reported(session)
        session.close()
        assert held(memory) == {"device": 0, "host": 0}
        assert memory.groups[0].ledger.in_use == 0


def test_a_session_that_rests_keeps_no_memory_that_others_were_given(held: Count) -> None:
    with closing(open_memory(device=160_000)) as memory:
        rests, session = memory.session(), memory.session()
        StepSource(seed=1).take(100).run(rests)
        source = StepSource()
        for _ in range(8):
            source.take(40).run(session)
        assert rests.report().moved["written"] > 0

        assert held(memory) == reported(session)


def test_used_bytes_are_the_live_pages_tails_and_sketches() -> None:
    with closing(open_memory(policy_text="quest(dense_layers=1, read=64)")) as memory:
        session = memory.session()
        StepSource(rows=2).take(37).run(session)
        frame = 4 * (6 + 4) * 8
        pages, tails = 2 * 3 * 2 * 8 * frame, 2 * 3 * 8 * 2 * (6 + 4) * 8
        device = session.report().bytes["device"]

        assert device.used == pages + tails + session.report().device_bytes["sketches"]
        assert device.used <= device.allocated <= device.peak
        assert session.report().device_bytes["pages"] >= pages


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize("nvme", [False, True], ids=["host", "host and nvme"])
def test_a_chunked_prompt_never_passes_the_device_budget(text: str, nvme: bool, tmp_path: Path) -> None:
    budget = BUDGETS[text]
    with closing(
        open_memory(
            small_layout(9),
            text,
            device=budget,
            host="48KiB" if nvme else "4MiB",
            nvme="8MiB" if nvme else None,
            path=tmp_path,
        )
    ) as memory:
        source, session, plain = StepSource(memory.layout), memory.session(), PlainSession(3)
        chunk = memory.max_prefill_chunk(1)
        assert chunk is not None
        assert chunk % memory.layout.block_tokens == 0
        session.expect(LONG_PROMPT)
        while source.position < LONG_PROMPT:
            step = source.take(min(chunk, LONG_PROMPT - source.position))
            for got, expected in zip(step.run(session), step.run(plain), strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
            assert all(ledger.in_use <= budget for ledger in memory.ledgers.values())
        for _ in range(30):
            source.take(1).run(session)

        assert all(ledger.peak <= budget for ledger in memory.ledgers.values())
        report = session.report()
        assert report.bytes["device"].peak <= report.bytes["device"].capacity == budget
        if "snapkv" in text:
            assert report.kept == 24 + 30
        elif nvme:
            assert report.moved["spilled"] > 0, "the prompt must be longer than device and host"
        for tier in report.bytes.values():
            assert tier.capacity is None or tier.used <= tier.allocated <= tier.capacity


def test_moved_bytes_are_counted_at_the_copies() -> None:
    with closing(open_memory(device=100_000)) as memory:
        source, session = StepSource(), memory.session()
        for _ in range(40):
            source.take(16).run(session)
        memory.groups[0].store.settle()
        moved, host = session.report().moved, session.report().bytes["host"]

        assert moved["written"] >= host.used, "all that is on the host was written there"
        assert moved["read"] > 0
        assert moved["spilled"] == 0


def test_bytes_of_several_devices_are_added_up() -> None:
    devices = [torch.device("cpu"), torch.device("cpu:0"), torch.device("cpu")]
    with closing(Memory(small_layout(), policy("full"), Budgets(device=90_000), None, devices)) as memory:
        session = memory.session()
        StepSource().take(37).run(session)
        report = session.report()

        assert len(memory.ledgers) == 2
        assert report.device_bytes["tails"] == 3 * 8 * 2 * (6 + 4) * 8
        assert sum(report.device_bytes.values()) == report.bytes["device"].allocated
        assert report.bytes["device"].capacity == 2 * 90_000


@pytest.fixture
def cuda_memory() -> Iterator[Memory]:
    layer = LayerLayout(num_query_heads=8, num_kv_heads=2, key_dim=64, value_dim=64, dtype="bfloat16")
    layout = KVLayout(layers=(layer,) * 4)
    tiers = load_config({"tiers": [{"name": "host", "backend": "host", "capacity": "256MiB"}]})
    devices = [torch.device("cuda")] * 4
    opened = Memory(layout, policy("quest(dense_layers=1, read=512)"), Budgets(device=8 << 20), tiers, devices)
    yield opened
    opened.close()


@pytest.mark.gpu
def test_reported_bytes_are_those_of_the_cuda_allocator(cuda_memory: Memory) -> None:
    device = torch.device("cuda")
    random = torch.Generator(device).manual_seed(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    session, position = cuda_memory.session(), 0
    chunk = cuda_memory.max_prefill_chunk(1)
    assert chunk is not None
    session.expect(40 * chunk)
    for tokens in [chunk] * 40 + [1] * 100:
        positions = torch.arange(position, position + tokens, device=device)[None]
        for index, layer in enumerate(cuda_memory.layout.layers):
            keys, values, query = (
                torch.randn(1, heads, tokens, 64, generator=random, device=device, dtype=torch.bfloat16)
                for heads in (layer.num_kv_heads, layer.num_kv_heads, layer.num_query_heads)
            )
            session.append(index, keys, values, positions)
            session.attend(index, query, positions, scale=0.125)
        position += tokens
    del keys, values, query, positions
    session._positions = None
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated(device) - before

    blocks = 512 * 64  # the allocator rounds every tensor up to 512 bytes
    assert 0 <= allocated - session.report().bytes["device"].allocated <= blocks
    session.close()
