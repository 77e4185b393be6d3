"""Attention over shared prefixes is attention of each request over its prefix and then its own keys."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.merge_partials import merge_partials
from kvtier.kernels.prefix_attention import blocked, plan_prefix, prefix_attention, reference
from kvtier.testing.prefix_problems import PrefixProblem
from kvtier.types import LayerLayout, Partial

CPU = torch.device("cpu")
SCALE = 0.3
LIMITS = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5}
BOTH = pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
LAYER = LayerLayout(num_query_heads=4, num_kv_heads=2, key_dim=8, value_dim=8, dtype="float32")


@st.composite
def problems(draw: st.DrawFn) -> PrefixProblem:
    """Any grouping of a few requests: groups without members, prefixes and own parts without tokens included."""
    prefixes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    groups = draw(st.lists(st.integers(0, len(prefixes) - 1), max_size=6))
    return PrefixProblem(
        groups=tuple(groups),
        prefix_lengths=tuple(prefixes),
        own_lengths=tuple(draw(st.integers(0, 20)) for _ in groups),
        sizes=(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 7))),
        dims=(8, draw(st.sampled_from([8, 12]))),
        dtype=draw(st.sampled_from(["float64", "float32", "float16", "bfloat16"])),
        device=CPU,
        queries=draw(st.integers(1, 4)),
        softcap=draw(st.none() | st.just(2.0)),
        seed=draw(st.integers(0, 2**20)),
    )


def run(implementation: ModuleType, problem: PrefixProblem) -> Partial:
    got = implementation.prefix_attention(*problem.tensors(), problem.plan(), scale=SCALE, softcap=problem.softcap)
    assert isinstance(got, Partial)
    return got


def assert_near(got: Partial, expected: Partial, dtype: str) -> None:
    assert got.out.dtype == got.lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    blind = expected.lse.isneginf()
    assert got.lse.isneginf().equal(blind)
    assert not got.out[blind].any()
    torch.testing.assert_close(got.out.double(), expected.out, rtol=0, atol=LIMITS[dtype])
    torch.testing.assert_close(got.lse.double(), expected.lse, rtol=0, atol=LIMITS[dtype])


@BOTH
@given(problem=problems())
def test_any_batch(implementation: ModuleType, problem: PrefixProblem) -> None:
    assert_near(run(implementation, problem), problem.expected(SCALE), problem.dtype)


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefixes_of_many_members(implementation: ModuleType, dtype: str) -> None:
    problem = PrefixProblem(
        groups=(0, 2, 0, 1, 0, 2, 0, 0, 0, 0, 1),
        prefix_lengths=(150, 33, 0),
        own_lengths=(5, 16, 16, 0, 32, 7, 5, 5, 1, 40, 16),
        sizes=(2, 4, 16),
        dims=(16, 16),
        dtype=dtype,  # type: ignore[arg-type]
        device=CPU,
    )
    assert_near(run(implementation, problem), problem.expected(SCALE), dtype)


@given(problems(), st.data())
def test_the_order_of_requests_is_that_of_their_results(problem: PrefixProblem, data: st.DataObject) -> None:
    turn = data.draw(st.permutations(range(len(problem.groups))))
    whole = run(reference, problem)
    q, k, v, prefix, own = problem.tensors()
    spans = [problem.plan().owns[request] for request in turn]
    slots = problem.sizes[2]
    pages = [own[:, span.page : span.page - (-span.length // slots)] for span in spans]
    plan = plan_prefix(
        [problem.groups[request] for request in turn],
        problem.prefix_lengths,
        [problem.own_lengths[request] for request in turn],
        layout=problem.plan().layout,
        page_tokens=slots,
        device=CPU,
        queries=problem.queries,
    )
    moved = torch.cat([own[:, :0], *pages], dim=1)
    got = prefix_attention(q[list(turn)], k, v, prefix, moved, plan, scale=SCALE, softcap=problem.softcap)
    assert_near(got, Partial(whole.out[list(turn)].double(), whole.lse[list(turn)].double()), problem.dtype)


@given(problems())
def test_prefix_and_own_keys_apart_merge_to_the_whole(problem: PrefixProblem) -> None:
    q, k, v, prefix, own = problem.tensors()
    layout, slots, groups = problem.plan().layout, problem.sizes[2], problem.groups

    def only(prefix_lengths: tuple[int, ...], own_lengths: tuple[int, ...]) -> Partial:
        plan = plan_prefix(
            groups,
            prefix_lengths,
            own_lengths,
            layout=layout,
            page_tokens=slots,
            device=CPU,
            queries=problem.queries,
        )
        frames = prefix[:, : plan.prefix_pages], own[:, : plan.own_pages]
        return prefix_attention(q, k, v, *frames, plan, scale=SCALE, softcap=problem.softcap)

    shared = only(problem.prefix_lengths, (0,) * len(groups))
    alone = only((0,) * len(problem.prefix_lengths), problem.own_lengths)
    assert_near(merge_partials([shared, alone]), problem.expected(SCALE), problem.dtype)


def test_the_batch_of_one_group_is_attention_over_one_longer_list() -> None:
    together = PrefixProblem(
        groups=(0,), prefix_lengths=(20,), own_lengths=(9,), sizes=(2, 2, 4), dims=(8, 8), dtype="float32", device=CPU
    )
    q, k, v, prefix, own = together.tensors()
    alone = plan_prefix([0], [0], [29], layout=LAYER, page_tokens=4, device=CPU)
    got = prefix_attention(q, k, v, prefix[:, :0], torch.cat([prefix, own], dim=1), alone, scale=SCALE)
    assert_near(got, together.expected(SCALE), "float32")


@pytest.mark.parametrize(
    ("groups", "prefixes", "owns", "options"),
    [
        ([0, 1], [5], [1, 1], {}),
        ([-1], [5], [1], {}),
        ([0], [5], [1, 1], {}),
        ([0], [-5], [1], {}),
        ([0], [5], [-1], {}),
        ([0], [5], [1], {"page_tokens": 0}),
        ([0], [5], [1], {"queries": 0}),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    groups: list[int], prefixes: list[int], owns: list[int], options: dict[str, int]
) -> None:
    with pytest.raises(InputError, match="plan_prefix needs for each request a group"):
        plan_prefix(groups, prefixes, owns, layout=LAYER, device=CPU, **{"page_tokens": 4, **options})


def test_windows_are_refused() -> None:
    layer = LayerLayout(num_query_heads=4, num_kv_heads=2, key_dim=8, value_dim=8, dtype="float32", window=9)
    with pytest.raises(InputError, match="got a window of 9; use attend_pages"):
        plan_prefix([0], [5], [1], layout=layer, page_tokens=4, device=CPU)


@pytest.mark.parametrize("name", ["q", "k_arena", "v_arena", "prefix_frames", "own_frames"])
def test_tensors_of_another_batch_are_refused(name: str) -> None:
    problem = PrefixProblem(
        groups=(0, 0),
        prefix_lengths=(9,),
        own_lengths=(5, 3),
        sizes=(2, 2, 4),
        dims=(8, 8),
        dtype="float32",
        device=CPU,
    )
    names = ["q", "k_arena", "v_arena", "prefix_frames", "own_frames"]
    tensors = dict(zip(names, problem.tensors(), strict=True))
    tensors[name] = tensors[name][:, :-1]
    with pytest.raises(InputError, match=rf"prefix_attention needs {name} of \["):
        prefix_attention(*tensors.values(), problem.plan(), scale=1.0)  # type: ignore[call-arg, arg-type, misc]
