"""How records reach a segment: staged or from where they lie, in which order, and never a byte of others."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.record import RecordHeader, header_seed, parse_header
from kvtier.storage_backends.engines import PosixEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.segment import writer
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.writer import RecordWriter

STORE = bytes(range(16))
EPOCH = 7
KIB, MIB = 1 << 10, 1 << 20


class Watched(PosixEngine):
    """Notes what is written, in the order in which it is drawn."""

    def __init__(self) -> None:
        super().__init__(threads=2)
        self.drawn: list[tuple[int, int]] = []

    def write(self, transfers: Iterable[Transfer], before: Callable[[int], None] | None = None) -> list[OSError | None]:
        def noted() -> Iterable[Transfer]:
            for transfer in transfers:
                self.drawn.append((transfer.offset, transfer.buffer.numel()))
                yield transfer

        return super().write(iter(noted()), before)


def noise(seed: int, size: int, *, aligned: bool = True) -> torch.Tensor:
    memory = empty_aligned(size + 1)[:size] if aligned else empty_aligned(size + 1)[1:]
    memory.numpy()[:] = np.random.default_rng(seed).integers(1, 256, size, dtype=np.uint8)
    return memory


def laid_out(segment: Segment, payloads: Sequence[Sequence[torch.Tensor]]) -> list[Draft]:
    """Drafts next to each other from the second block on."""
    drafts = []
    offset = 4096
    for number, buffers in enumerate(payloads):
        draft = Draft(
            key=bytes([number]) * 32, namespace=bytes(32), tenant="default", meta=b"", buffers=buffers,
            extent_bytes=64 * KIB, created_us=1, sequence=number + 1, segment=segment, offset=offset,
        )  # fmt: skip
        drafts.append(draft)
        offset += draft.record_bytes
    return drafts


def written(
    path: Path, payloads: Sequence[Sequence[torch.Tensor]], times: int = 1
) -> tuple[bytes, list[Draft], Watched]:
    """What is on the disk after drafts were written, by a writer that has written them ``times`` times."""
    with Watched() as engine:
        for turn in range(times):
            file = engine.open(path / f"segment-{turn}", writable=True, create=True)
            size = 8192 + sum(sum(part.numel() for part in parts) + 12_288 for parts in payloads)
            file.allocate(size // 4096 * 4096)
            segment = Segment(1, file, size, epoch=EPOCH)
            drafts = laid_out(segment, payloads)
            engine.drawn.clear()
            if not turn:
                records = RecordWriter(engine, STORE)
            records.write(drafts, Draft.make_row)
            file.close()
        records.close()
        return (path / f"segment-{times - 1}").read_bytes(), drafts, engine


def check(content: bytes, draft: Draft) -> RecordHeader:
    """A record lies where its draft says, its padding zero."""
    assert draft.error is None
    header = parse_header(content[draft.offset :][: draft.header_bytes], header_seed(STORE, EPOCH))
    payload = b"".join(part.numpy().tobytes() for part in draft.buffers)
    rest = content[draft.offset + draft.header_bytes : draft.offset + draft.record_bytes]
    assert rest == payload.ljust(len(rest), b"\0")
    assert header == draft.header
    return header


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_records_of_any_parts_arrive_as_the_format_says(tmp_path: Path, data: st.DataObject) -> None:
    """Small and large, of one buffer and of several, aligned or not, with a stage that is used up now and then."""
    size = st.one_of(
        st.integers(0, 9000), st.integers(60_000, 70_000), st.sampled_from([4096, 65_536, 300_000, 524_288])
    )
    parts = st.lists(st.tuples(size, st.booleans()), max_size=3)
    shapes = data.draw(st.lists(parts, min_size=1, max_size=6))
    payloads = [[noise(at, n, aligned=aligned) for at, (n, aligned) in enumerate(shape)] for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_STAGE_BYTES", data.draw(st.sampled_from([64 * KIB, 512 * KIB, 8 * MIB])))
        content, drafts, _ = written(tmp_path, payloads, times=data.draw(st.integers(1, 2)))
    for draft in drafts:
        check(content, draft)
        assert draft.row


def test_small_records_are_one_transfer_each_and_few_system_calls(tmp_path: Path) -> None:
    payloads = [[noise(number, 64 * KIB)] for number in range(16)]
    content, drafts, engine = written(tmp_path, payloads)
    assert engine.drawn == [(4096 + number * 68 * KIB, 68 * KIB) for number in range(16)]
    assert all(check(content, draft) for draft in drafts)


def test_the_first_large_payload_goes_ahead_of_its_header(tmp_path: Path) -> None:
    """It is digested while it is under way; later ones are digested while those before them are."""
    content, drafts, engine = written(tmp_path, [[noise(number, MIB)] for number in range(3)])
    first, second, third = (draft.offset for draft in drafts)
    assert engine.drawn == [
        (first + 4096, MIB), (first, 4096), (second, 4096), (second + 4096, MIB), (third, 4096), (third + 4096, MIB)
    ]  # fmt: skip
    assert all(check(content, draft) for draft in drafts)


def test_nothing_of_an_earlier_record_stays_in_the_memory_that_is_written(tmp_path: Path) -> None:
    """Headers and padding are zero where they say nothing, though the stage was used before."""
    with Watched() as engine:
        records = RecordWriter(engine, STORE)
        for turn, sizes in enumerate([[100_000, 100_000], [1, 4097, 0, 50_001]]):
            file = engine.open(tmp_path / f"{turn}", writable=True, create=True)
            file.allocate(MIB)
            drafts = laid_out(Segment(1, file, MIB, epoch=EPOCH), [[noise(7, size)] for size in sizes])
            records.write(drafts)
            file.close()
        content = (tmp_path / "1").read_bytes()
        for draft in drafts:
            check(content, draft)
        records.close()
