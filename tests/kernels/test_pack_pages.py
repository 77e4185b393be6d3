"""Pages into rows and back, against a loop; frames that are not named are neither read nor written."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.pack_pages import blocked, move_rows, pack_pages, reference, runs_of, unpack_pages

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def arenas(frames: int, slots: int, dims: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(frames)
    keys, values = (torch.randn(frames, slots, dim, generator=generator).to(dtype) for dim in dims)
    keys[0], values[0] = torch.nan, torch.nan  # comes along bit by bit
    return keys, values


def expected(keys: torch.Tensor, values: torch.Tensor, frames: list[int]) -> bytes:
    """K then V of each page."""
    pages = [(keys[frame].reshape(-1), values[frame].reshape(-1)) for frame in frames]
    return b"".join(bytes(side.view(torch.uint8).numpy()) for page in pages for side in page)


def bytes_of(rows: torch.Tensor) -> bytes:
    return bytes(rows.flatten().view(torch.uint8).numpy())


frame_lists = st.lists(st.integers(0, 20), min_size=1, max_size=12) | st.builds(
    lambda first, length, rest: [*range(first, first + length), *rest],
    st.integers(0, 10),
    st.integers(1, 10),
    st.lists(st.integers(0, 20), max_size=3),
)


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@given(frames=frame_lists, dtype=st.sampled_from(DTYPES))
def test_rows_are_keys_then_values(implementation: ModuleType, frames: list[int], dtype: torch.dtype) -> None:
    keys, values = arenas(21, 4, (6, 3), dtype)
    rows = torch.full((len(frames), 4 * 9), torch.nan, dtype=dtype)
    implementation.pack_pages(keys, values, torch.tensor(frames), rows)
    assert bytes_of(rows) == expected(keys, values, frames)


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@given(frames=frame_lists.map(lambda found: list(dict.fromkeys(found))), dtype=st.sampled_from(DTYPES))
def test_what_was_packed_comes_back(implementation: ModuleType, frames: list[int], dtype: torch.dtype) -> None:
    keys, values = arenas(21, 4, (6, 3), dtype)
    rows = pack_pages(keys, values, torch.tensor(frames))
    got = [torch.full_like(arena, 7) for arena in (keys, values)]
    implementation.unpack_pages(rows, *got, torch.tensor(frames))
    for arena, filled in zip((keys, values), got, strict=True):
        assert bytes_of(filled[frames]) == bytes_of(arena[frames])
        others = [frame for frame in range(21) if frame not in frames]
        assert bool((filled[others] == 7).all())


def test_rows_of_heads_are_ordered_as_a_record() -> None:
    keys, values = arenas(9, 2, (4, 4), torch.float16)
    frames = torch.tensor([[3, 4, 5], [8, 1, 0]])
    rows = pack_pages(keys, values, frames)
    assert rows.shape == (2, 3, 16)
    assert bytes_of(rows) == expected(keys, values, frames.flatten().tolist())


def test_arenas_may_be_parts_of_one() -> None:
    both = torch.arange(5 * 2 * 12.0).view(5, 24)
    keys, values = both[:, :16].unflatten(1, (2, 8)), both[:, 16:].unflatten(1, (2, 4))
    assert pack_pages(keys, values, torch.tensor([4, 1])).equal(both[[4, 1]])
    into = torch.empty(3, 24)
    assert pack_pages(keys, values, torch.tensor([2, 3, 4]), into=into) is into
    assert into.equal(both[2:])


def test_no_pages() -> None:
    keys, values = arenas(3, 2, (4, 4), torch.float32)
    none = torch.empty(2, 0, dtype=torch.int64)
    rows = pack_pages(keys, values, none)
    assert rows.shape == (2, 0, 16)
    unpack_pages(rows, keys, values, none)


@pytest.mark.parametrize("frames", [[-1], [3], [0, 3], [2, 3, 4, 5, 6], [0, 2, 5]], ids=str)
def test_frames_out_of_range_are_named(frames: list[int]) -> None:
    keys, values = arenas(3, 2, (4, 4), torch.float32)
    before = keys.clone()
    with pytest.raises(InputError, match=r"frames must lie in \[0, 3\)"):
        pack_pages(keys, values, torch.tensor(frames))
    with pytest.raises(InputError, match=r"frames must lie in \[0, 3\)"):
        unpack_pages(torch.zeros(len(frames), 16), keys, values, torch.tensor(frames))
    assert bytes_of(keys) == bytes_of(before)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (torch.zeros(2, 15), "got \\[2, 15\\]"),
        (torch.zeros(2, 16, dtype=torch.float64), "of torch.float64"),
        (torch.zeros(16, 2).mT, r"strides \(1, 2\)"),
    ],
    ids=["shape", "type", "strides"],
)
def test_other_rows_are_refused(rows: torch.Tensor, told: str) -> None:
    keys, values = arenas(3, 2, (4, 4), torch.float32)
    with pytest.raises(InputError, match=told):
        pack_pages(keys, values, torch.tensor([0, 1]), into=rows)


@pytest.mark.parametrize(
    ("keys", "values", "frames"),
    [
        (torch.zeros(3, 2, 4), torch.zeros(3, 3, 4), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3, 2, 4), torch.zeros(3, 2, 4, dtype=torch.float16), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3, 4, 2).mT, torch.zeros(3, 2, 4), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(1, dtype=torch.int32)),
    ],
    ids=["slots", "types", "strides", "frames"],
)
def test_other_arenas_are_refused(keys: torch.Tensor, values: torch.Tensor, frames: torch.Tensor) -> None:
    with pytest.raises(InputError, match="pages need arenas"):
        pack_pages(keys, values, frames)


@given(frame_lists, st.randoms(use_true_random=False), st.booleans())
def test_rows_move_as_they_are_told(source_rows: list[int], random: object, neighbours: bool) -> None:
    count = len(source_rows)
    target_rows = list(range(5, 5 + count)) if neighbours else random.sample(range(40), count)  # type: ignore[attr-defined]
    source, target = torch.randn(21, 3), torch.zeros(40, 3)
    copies = move_rows(source, torch.tensor(source_rows), target, torch.tensor(target_rows))
    wanted = torch.zeros(40, 3)
    for at, to in zip(source_rows, target_rows, strict=True):
        wanted[to] = source[at]
    assert target.equal(wanted)
    assert 1 <= copies <= max(1, count // 8)


def test_neighbours_travel_as_one_copy() -> None:
    source, target = torch.randn(40, 3), torch.zeros(40, 3)
    rows = torch.arange(16)
    assert move_rows(source, rows + 3, target, rows + 7) == 1
    assert move_rows(source, torch.cat([rows, rows + 20]), target, torch.cat([rows + 20, rows])) == 2
    assert target[20:36].equal(source[:16])
    assert move_rows(source, rows[:0], target, rows[:0]) == 0


def test_runs_end_where_either_side_jumps() -> None:
    source, target = torch.tensor([4, 5, 6, 7, 1, 2]), torch.tensor([0, 1, 5, 6, 7, 8])
    assert runs_of(source, target, limits=(8, 9)) == [(4, 0, 2), (6, 5, 2), (1, 7, 2)]


def test_rows_that_do_not_fit_are_refused() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match="move_rows needs rows of one shape and type"):
        move_rows(torch.zeros(3, 4), one, torch.zeros(3, 5), one)
    with pytest.raises(InputError, match=r"frames must lie in \[0, 3\), got 3 to 3"):
        move_rows(torch.zeros(4, 4), one + 3, torch.zeros(3, 4), one + 3)
