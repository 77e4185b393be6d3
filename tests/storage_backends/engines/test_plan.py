"""Plans of a batch: every byte once, nothing mixed, no more than the limits allow."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from kvtier.storage_backends.engines.base import EngineFile, Transfer
from kvtier.storage_backends.engines.laid import lay
from kvtier.storage_backends.engines.plan import Job, SizeLimits, in_order, plan
from kvtier.storage_backends.memory import empty_aligned

BLOCK = 4096


class FakeFile(EngineFile):
    """A file of which only ``direct`` matters."""

    def __init__(self, direct: bool) -> None:
        self.direct = direct

    size = allocated_bytes = 0  # type: ignore[assignment]

    def allocate(self, size: int) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


FILES = (FakeFile(direct=True), FakeFile(direct=False))
PIECES = st.tuples(
    st.sampled_from(FILES),
    st.one_of(st.integers(0, 40).map(lambda block: block * BLOCK), st.integers(0, 40 * BLOCK)),
    st.one_of(st.integers(0, 30).map(lambda block: block * BLOCK), st.integers(0, 30 * BLOCK)),
    st.sampled_from([0, 0, 1]),
)
WHOLE = empty_aligned(40 * BLOCK)


def planned(transfers: list[Transfer], straight: int, bounced: int) -> list[Job]:
    """Jobs of at most so many bytes, in the order of the files."""
    laid = [lay(transfer) for transfer in transfers]
    return list(plan(laid, in_order(laid), SizeLimits(lambda _: straight, bounced)))


@given(
    drawn=st.lists(PIECES, max_size=20),
    straight=st.integers(1, 20).map(lambda blocks: blocks * BLOCK),
    bounced=st.integers(1, 4).map(lambda blocks: blocks * BLOCK),
)
def test_every_byte_is_planned_once_where_it_belongs(
    drawn: list[tuple[FakeFile, int, int, int]], straight: int, bounced: int
) -> None:
    transfers = [Transfer(file, offset, WHOLE[shift : shift + size]) for file, offset, size, shift in drawn]

    jobs = planned(transfers, straight, bounced)

    seen: dict[int, list[tuple[int, int]]] = {}
    for job in jobs:
        assert 0 < job.nbytes <= (straight if job.straight else bounced)
        assert [single.offset for single in job.single()] == sorted(single.offset for single in job.single())
        for single in job.single():
            (part,) = single.parts
            file, offset, buffer, _ = transfers[part.transfer]
            assert job.file is file
            assert single.offset == offset + part.start
            seen.setdefault(part.transfer, []).append((part.start, part.stop))
            fits = not (offset | buffer.numel() | buffer.data_ptr()) % BLOCK
            assert job.straight == (fits or not file.direct)
            assert part.stop == buffer.numel() or not (offset + part.stop) % BLOCK, "a cut inside a block"
    for index, (_, _, size, _) in enumerate(drawn):
        spans = sorted(seen.get(index, []))
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])][: len(spans)]
        assert (spans[-1][1] if spans else 0) == size


def test_neighbours_join_and_large_ones_are_cut() -> None:
    file = FILES[0]
    four = [Transfer(file, i * BLOCK, WHOLE[i * BLOCK : (i + 1) * BLOCK]) for i in (2, 0, 3, 1)]

    assert [job.offset for job in planned(four, 4 * BLOCK, BLOCK)] == [0]
    assert [job.offset for job in planned(four, 2 * BLOCK, BLOCK)] == [0, 2 * BLOCK]
    whole = Transfer(file, BLOCK, WHOLE[: 10 * BLOCK])
    assert [job.nbytes // BLOCK for job in planned([whole], 4 * BLOCK, BLOCK)] == [4, 4, 2]


def test_shares_are_fair_but_worth_a_call() -> None:
    def straight(total: int) -> int:
        return SizeLimits.share(total, 8, least=1 << 19, most=1 << 23, bounced=1 << 20).straight(0)

    assert [straight(total) for total in (100, 1 << 24, (1 << 24) + 1, 1 << 30)] == [
        1 << 19,
        1 << 21,
        (1 << 21) + BLOCK,
        1 << 23,
    ]


def test_small_aligned_transfers_are_bounced_with_their_neighbours() -> None:
    """Headers between payloads that are not aligned: one job, not one each."""
    sizes = [(0, BLOCK), (1, 16 * BLOCK), (0, BLOCK), (1, 16 * BLOCK)]
    transfers, offset = [], 0
    for shift, size in sizes:
        transfers.append(Transfer(FILES[0], offset, WHOLE[shift : shift + size]))
        offset += size

    (job,) = planned(transfers, 100 * BLOCK, 100 * BLOCK)

    assert not job.straight
    assert [part.transfer for part in job.parts] == [0, 1, 2, 3]


def test_jobs_grow_from_the_first_and_shrink_to_the_last() -> None:
    whole = [lay(Transfer(FILES[0], 0, WHOLE))]

    def sizes(limits: SizeLimits) -> list[int]:
        return [job.nbytes // BLOCK for job in plan(whole, [0], limits)]

    growing = sizes(SizeLimits.growing(least=BLOCK, most=8 * BLOCK, bounced=BLOCK))
    shrinking = sizes(SizeLimits.shrinking(40 * BLOCK, least=BLOCK, most=8 * BLOCK, bounced=BLOCK))
    assert sum(growing) == sum(shrinking) == 40
    assert growing[:-1] == sorted(growing[:-1])
    assert growing[:3] == [1, 1, 1]
    assert shrinking == sorted(shrinking, reverse=True)
    assert (max(growing), max(shrinking), shrinking[-1]) == (8, 8, 1)


def test_transfers_are_drawn_as_jobs_are() -> None:
    """What is known late does not hold up what is known already."""
    transfers = [lay(Transfer(FILES[0], i * BLOCK, WHOLE[i * BLOCK : (i + 1) * BLOCK])) for i in range(20)]
    drawn: list[int] = []

    def order() -> Iterator[int]:
        for at in range(20):
            drawn.append(at)
            yield at

    jobs = plan(transfers, order(), SizeLimits(lambda _: 2 * BLOCK, BLOCK))
    assert next(jobs).offset == 0
    assert len(drawn) <= 3
    assert sum(job.nbytes for job in jobs) == 18 * BLOCK
