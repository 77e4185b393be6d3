"""Attention over shared prefixes in Triton, against fp64; frames not named and slots behind the end are NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.gather_attention.table import SPLITS
from kvtier.kernels.prefix_attention import programs as programs_of
from kvtier.kernels.prefix_attention import triton as kernel
from kvtier.kernels.prefix_attention.programs import Span, Task, cut
from kvtier.kernels.tiles import DEBUG_VARIABLE
from kvtier.testing.attention_problems import assert_near
from kvtier.testing.prefix_problems import PrefixProblem
from kvtier.types import LayerLayout

DTYPES = ["float32", "float16", "bfloat16"]
SCALE = 0.3
MANY = {
    "groups": (0, 2, 0, 1, 0, 2, 0, 0, 1),
    "prefix_lengths": (150, 33, 0, 7),
    "own_lengths": (5, 16, 90, 0, 32, 7, 1, 40, 16),
}


@pytest.fixture(autouse=True)
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small batches as a large GPU would cut large ones."""
    monkeypatch.setattr(programs_of, "SPLITS", SPLITS._replace(least_keys=40))
    monkeypatch.setattr(programs_of, "processors", lambda _: 64)


def check(problem: PrefixProblem) -> None:
    got = kernel.prefix_attention(*problem.tensors(), problem.plan(), scale=SCALE, softcap=problem.softcap)
    assert_near(got, problem.expected(SCALE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "sizes", "dims", "queries", "softcap"),
    [
        ({"groups": (0,), "prefix_lengths": (1,), "own_lengths": (1,)}, (1, 1, 1), (8, 8), 1, None),
        (MANY, (2, 4, 16), (64, 64), 1, None),
        (MANY, (1, 2, 7), (40, 24), 3, 2.0),
        ({"groups": (0, 1), "prefix_lengths": (0, 0), "own_lengths": (0, 9)}, (2, 1, 4), (8, 8), 1, None),
    ],
    ids=["one token", "many", "many queries", "no prefix"],
)
def test_batches(
    dtype: str,
    batch: dict[str, tuple[int, ...]],
    sizes: tuple[int, int, int],
    dims: tuple[int, int],
    queries: int,
    softcap: float | None,
    device: torch.device,
) -> None:
    check(
        PrefixProblem(
            **batch,
            sizes=sizes,
            dims=dims,
            queries=queries,
            softcap=softcap,
            dtype=dtype,  # type: ignore[arg-type]
            device=device,
        )
    )


@settings(max_examples=10)
@given(st.data())
def test_any_batch(device: torch.device, data: st.DataObject) -> None:
    prefixes = data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=3))
    groups = data.draw(st.lists(st.integers(0, len(prefixes) - 1), min_size=1, max_size=5))
    check(
        PrefixProblem(
            groups=tuple(groups),
            prefix_lengths=tuple(prefixes),
            own_lengths=tuple(data.draw(st.integers(0, 50)) for _ in groups),
            sizes=(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 17))),
            dims=(8, data.draw(st.sampled_from([8, 24]))),
            queries=data.draw(st.integers(1, 3)),
            dtype=data.draw(st.sampled_from(DTYPES)),  # type: ignore[arg-type]
            device=device,
            seed=data.draw(st.integers(0, 2**20)),
        )
    )


def test_nobody_asks(device: torch.device) -> None:
    problem = PrefixProblem(
        groups=(), prefix_lengths=(9,), own_lengths=(), sizes=(2, 2, 4), dims=(8, 8), dtype="float32", device=device
    )
    got = kernel.prefix_attention(*problem.tensors(), problem.plan(), scale=1.0, softcap=None)
    assert got.out.shape == (0, 4, 1, 8)


def test_fp64_goes_to_torch(device: torch.device) -> None:
    problem = PrefixProblem(**MANY, sizes=(2, 2, 4), dims=(8, 8), dtype="float64", device=device)
    got = kernel.prefix_attention(*problem.tensors(), problem.plan(), scale=1.0, softcap=None)
    assert got.out.dtype == torch.float64


@pytest.mark.parametrize("which", [3, 4])
def test_debug_mode_names_frames_out_of_range(
    which: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    problem = PrefixProblem(**MANY, sizes=(2, 2, 4), dims=(8, 8), dtype="float32", device=device)
    tensors = list(problem.tensors())
    tensors[which][1, 2] = -1
    with pytest.raises(InputError, match=r"frames must lie in \[0, "):
        kernel.prefix_attention(*tensors, problem.plan(), scale=1.0, softcap=None)  # type: ignore[call-arg, arg-type]


@given(st.data())
def test_tasks_cover_every_key_of_every_row_once(data: st.DataObject) -> None:
    prefixes = data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=4))
    groups = data.draw(st.lists(st.integers(0, len(prefixes) - 1), max_size=9))
    owns = [data.draw(st.integers(0, 300)) for _ in groups]
    members = [[request for request, group in enumerate(groups) if group == at] for at in range(len(prefixes))]
    layer = LayerLayout(num_query_heads=6, num_kv_heads=2, key_dim=64, value_dim=64, dtype="bfloat16")
    queries = data.draw(st.integers(1, 3))
    plan = cut(
        members,
        [Span(10 * at, length) for at, length in enumerate(prefixes)],
        [Span(1000 + at, length) for at, length in enumerate(owns)],
        queries,
        layer,
        torch.device("cpu"),
    )
    assert sorted(plan.order.tolist()) == list(range(len(groups)))
    seen: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    parts = set()
    for task in (Task(*row) for row in plan.tasks.tolist()):
        first_row = task.tile * plan.tile.rows
        assert first_row < task.members * 3 * queries
        for row in range(first_row, min(first_row + plan.tile.rows, task.members * 3 * queries)):
            request = int(plan.order[task.first + row // (3 * queries)])
            seen.setdefault((request, row % (3 * queries)), []).append((task.own, task.start, task.stop))
            parts.add(int(plan.part_starts[request]) + task.part)
            assert task.part < plan.part_starts[request + 1] - plan.part_starts[request]
            assert task.page == (1000 + request if task.own else 10 * groups[request])
    assert parts == set(range(plan.parts))
    for request, group in enumerate(groups):
        for row in range(3 * queries):
            for own, length in enumerate((prefixes[group], owns[request])):
                cuts = sorted(span[1:] for span in seen.get((request, row), []) if span[0] == own)
                assert [at for start, stop in cuts for at in range(start, stop)] == list(range(length))


def test_a_long_prefix_is_split_beside_many_short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs_of, "SPLITS", SPLITS)
    monkeypatch.setattr(programs_of, "processors", lambda _: 132)
    layer = LayerLayout(num_query_heads=32, num_kv_heads=8, key_dim=128, value_dim=128, dtype="bfloat16")
    owns = [Span(13 * at, 200) for at in range(64)]
    plan = cut([range(64)], [Span(0, 32768)], owns, 1, layer, torch.device("cpu"))
    longest = max(task.stop - task.start for task in (Task(*row) for row in plan.tasks.tolist()))
    assert longest < 32768 // 6
    assert plan.tasks[0, 6] - plan.tasks[0, 5] == longest
