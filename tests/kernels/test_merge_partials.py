"""Laws of the merge: order, grouping, empty parts, sinks; and the fast path against the dense sum."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.merge_partials import blocked, empty_partial, merge_partials, reference, sink_partial
from kvtier.types import Partial

DTYPES = [torch.float64, torch.float32]


def attention(logits: torch.Tensor, values: torch.Tensor) -> Partial:
    """The partial of logits [B, Hq, Tq, N] and values [B, Hq, N, Dv]."""
    if not logits.shape[-1]:
        shape = logits.shape[:-1]
        return Partial(values.new_zeros(*shape, values.shape[-1]), values.new_full(shape, -torch.inf))
    return Partial(logits.softmax(-1) @ values, logits.logsumexp(-1))


def assert_same(got: Partial, expected: Partial) -> None:
    """Equal but for rounding: an lse of size L is known to ``eps * L``, and its weight to the same relative error."""
    finite = expected.lse[~expected.lse.isneginf()].abs()
    largest = max(1.0, float(finite.max()) if finite.numel() else 0.0)
    limit = 16 * torch.finfo(expected.out.dtype).eps * largest
    assert got.lse.isneginf().equal(expected.lse.isneginf())
    torch.testing.assert_close(got.out, expected.out, rtol=limit, atol=limit)
    torch.testing.assert_close(got.lse, expected.lse, rtol=limit, atol=limit)


@st.composite
def splits(draw: st.DrawFn, least: int = 1) -> tuple[list[Partial], Partial]:
    """Parts of one softmax, some of them empty, and the whole."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    sizes = draw(st.lists(st.integers(0, 4), min_size=least, max_size=6))
    dtype = draw(st.sampled_from(DTYPES))
    spread = draw(st.sampled_from([1.0, 30.0, 300.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logits = torch.randn(*shape, sum(sizes), generator=generator, dtype=dtype) * spread
    values = torch.randn(*shape[:2], sum(sizes), 5, generator=generator, dtype=dtype)
    parts = [attention(*pair) for pair in zip(logits.split(sizes, -1), values.split(sizes, -2), strict=True)]
    return parts, attention(logits, values)


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@given(splits(), st.data())
def test_parts_in_any_order_are_the_whole(
    implementation: ModuleType, split: tuple[list[Partial], Partial], data: st.DataObject
) -> None:
    parts, whole = split
    assert_same(implementation.merge_partials(data.draw(st.permutations(parts))), whole)


@given(splits(least=3), st.data())
def test_grouping_does_not_matter(split: tuple[list[Partial], Partial], data: st.DataObject) -> None:
    parts, whole = split
    cut = data.draw(st.integers(1, len(parts) - 1))
    assert_same(merge_partials([merge_partials(parts[:cut]), merge_partials(parts[cut:])]), whole)


@given(splits(), st.data())
def test_an_empty_part_changes_nothing(split: tuple[list[Partial], Partial], data: st.DataObject) -> None:
    parts, whole = split
    empty = Partial(torch.zeros_like(whole.out), torch.full_like(whole.lse, -torch.inf))
    merged = merge_partials(parts)
    for pair in ([merged, empty], [empty, merged]):
        again = merge_partials(pair)
        assert again.out.equal(merged.out)
        assert again.lse.equal(merged.lse)


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_empty_parts_alone_stay_empty(implementation: ModuleType, count: int) -> None:
    empty = empty_partial(torch.zeros(2, 4, 3, 8), 6)
    merged = implementation.merge_partials([empty] * count)
    assert merged.out.equal(torch.zeros(2, 4, 3, 6))
    assert merged.lse.equal(torch.full((2, 4, 3), -torch.inf))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_is_not_hidden(place: int) -> None:
    parts = [Partial(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)) for _ in range(3)]
    parts[place] = Partial(parts[place].out * torch.nan, parts[place].lse * torch.nan)
    merged = merge_partials(parts)
    assert merged.out.isnan().all()
    assert merged.lse.isnan().all()


def test_parts_are_not_written_to() -> None:
    parts = [Partial(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)) for _ in range(4)]
    copies = [Partial(part.out.clone(), part.lse.clone()) for part in parts]
    merge_partials(parts)
    for part, copy in zip(parts, copies, strict=True):
        assert part.out.equal(copy.out)
        assert part.lse.equal(copy.lse)


def test_a_single_part_is_returned() -> None:
    part = Partial(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3))
    assert merge_partials([part]) is part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sink_is_one_more_column_of_value_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, values = torch.randn(2, 4, 3, 6, generator=generator), torch.randn(2, 4, 6, 5, generator=generator)
    s_aux = torch.randn(4, generator=generator).to(dtype)
    column = s_aux.float()[None, :, None, None].expand(2, 4, 3, 1)
    with_column = attention(torch.cat([logits, column], -1), torch.cat([values, torch.zeros(2, 4, 1, 5)], 2))
    part = attention(logits, values)
    assert_same(merge_partials([part, sink_partial(s_aux, part)]), with_column)


def test_only_a_sink() -> None:
    empty = empty_partial(torch.zeros(1, 2, 3, 8), 4)
    merged = merge_partials([empty, sink_partial(torch.tensor([1.0, -2.0]), empty)])
    assert not merged.out.any()
    assert merged.lse.equal(torch.tensor([1.0, -2.0])[None, :, None].expand(1, 2, 3))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_empty_partials_have_the_accumulation_type(dtype: torch.dtype, wide: torch.dtype) -> None:
    part = empty_partial(torch.zeros(2, 4, 3, 8, dtype=dtype), 6)
    assert part.out.dtype == part.lse.dtype == wide


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least one partial, got none; empty_partial\(\)"):
        merge_partials([])


@pytest.mark.parametrize(
    "shapes",
    [
        [((1, 2, 3, 4), (1, 2, 3)), ((1, 2, 3, 5), (1, 2, 3))],
        [((1, 2, 3, 4), (1, 2, 3)), ((1, 2, 3, 4), (1, 2, 1))],
        [((1, 2, 3, 4), (1, 3, 3)), ((1, 2, 3, 4), (1, 3, 3))],
    ],
)
def test_shapes_that_differ_are_refused(shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    with pytest.raises(InputError, match="all of one shape, got"):
        merge_partials([Partial(torch.zeros(out), torch.zeros(lse)) for out, lse in shapes])


def test_a_sink_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"one logit per query head, \[4\], got \[2\]"):
        sink_partial(torch.zeros(2), empty_partial(torch.zeros(1, 4, 3, 8), 6))
