"""Rows of pages into keys and values: every implementation against one token at a time, any strides, any types."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.split_rows import blocked, native, plan_split, reference

CPU = torch.device("cpu")
OBSTACLE = native.obstacle(CPU)
IMPLEMENTATIONS = [
    pytest.param(reference, id="reference"),
    pytest.param(blocked, id="blocked"),
    pytest.param(
        native, id="native", marks=pytest.mark.skipif(OBSTACLE is not None, reason=f"cannot run here: {OBSTACLE}")
    ),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8]
LAYERS, HEADS = 3, 2


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    size = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def rows_of(k: torch.Tensor, v: torch.Tensor, page: int) -> torch.Tensor:
    """Token by token, as the format says."""
    parts = []
    for layer in range(k.shape[0]):
        for head in range(k.shape[1]):
            for start in range(0, k.shape[2], page):
                parts += [k[layer, head, token] for token in range(start, start + page)]
                parts += [v[layer, head, token] for token in range(start, start + page)]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts])


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.contiguous().view(torch.uint8).equal(two.contiguous().view(torch.uint8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(
    page=st.integers(1, 5),
    pages=st.integers(1, 4),
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 3),
    streamed=st.booleans(),
    data=st.data(),
)
def test_heads_are_copied_as_they_are_asked_for(
    implementation: ModuleType,
    page: int,
    pages: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    offset: int,
    streamed: bool,
    data: st.DataObject,
) -> None:
    """Into views of larger tensors whose other bytes stay as they are, at any alignment."""
    tokens = page * pages
    wanted = [noise(LAYERS, HEADS, tokens, dim, dtype=dtype) for dim in dims]
    rows = rows_of(wanted[0], wanted[1], page)
    large = [noise(LAYERS, HEADS, tokens + offset + 1, dim, dtype=dtype) for dim in dims]
    before = [tensor.clone() for tensor in large]
    into = [tensor[:, :, offset : offset + tokens] for tensor in large]
    end = LAYERS * HEADS
    first = data.draw(st.integers(0, end), label="first")
    stop = data.draw(st.integers(first, end), label="stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LEAST_STREAMED", 0 if streamed else 1 << 30)
        copy = implementation.plan(rows, *into, page)
    copy(first, stop)

    for got, old, right in zip(large, before, wanted, strict=True):
        expected = old.flatten(0, 1).clone()
        expected[first:stop, offset : offset + tokens] = right.flatten(0, 1)[first:stop]
        assert same(got, expected.view(got.shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_strides(implementation: ModuleType) -> None:
    k, v = noise(LAYERS, HEADS, 8, 4, dtype=torch.float32), noise(LAYERS, HEADS, 8, 6, dtype=torch.float32)
    into = torch.zeros(4, 8, HEADS, LAYERS).permute(3, 2, 1, 0), torch.zeros(LAYERS, 8, HEADS, 6).transpose(1, 2)
    copy = implementation.plan(rows_of(k, v, 4), *into, 4)
    for head in range(LAYERS * HEADS):
        copy(head, head + 1)
    assert same(into[0], k)
    assert same(into[1], v)


@pytest.mark.parametrize(
    ("rows", "keys", "values", "page"),
    [
        (torch.zeros(2 * 8 * 16, dtype=torch.uint8), torch.zeros(1, 2, 8, 2), torch.zeros(1, 2, 8, 2), 3),
        (torch.zeros(2 * 8 * 16 + 1, dtype=torch.uint8), torch.zeros(1, 2, 8, 2), torch.zeros(1, 2, 8, 2), 4),
        (torch.zeros(2 * 8 * 4), torch.zeros(1, 2, 8, 2), torch.zeros(1, 2, 8, 2), 4),
        (torch.zeros(2 * 8 * 12, dtype=torch.uint8), torch.zeros(1, 2, 8, 2), torch.zeros(1, 2, 8, 2).half(), 4),
        (torch.zeros(2 * 8 * 16, dtype=torch.uint8), torch.zeros(1, 2, 8, 2), torch.zeros(2, 1, 8, 2), 4),
    ],
)
def test_what_does_not_fit_is_refused(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page: int) -> None:
    with pytest.raises(InputError, match="need as many contiguous bytes of rows, got"):
        plan_split(rows, keys, values, page_tokens=page)


@pytest.mark.gpu
def test_between_devices() -> None:
    k, v = noise(LAYERS, HEADS, 8, 4, dtype=torch.bfloat16), noise(LAYERS, HEADS, 8, 6, dtype=torch.bfloat16)
    into = [torch.zeros_like(tensor, device="cuda") for tensor in (k, v)]
    plan_split(rows_of(k, v, 4), *into, page_tokens=4)(0, LAYERS * HEADS)
    assert same(into[0].cpu(), k)
    assert same(into[1].cpu(), v)
