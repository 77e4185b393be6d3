"""Bounds of pages are exact, whatever the layout of the keys."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.page_summaries import blocked, page_bounds, reference

BOTH = pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])


@BOTH
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    slots=st.integers(1, 5),
    dim=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_bounds_are_those_of_numpy(
    implementation: ModuleType, leading: list[int], slots: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(*leading, slots, dim, generator=generator).to(dtype)
    kmin, kmax = implementation.page_bounds(k)
    assert kmin.dtype == kmax.dtype == dtype
    assert kmin.double().numpy().tolist() == k.double().numpy().min(axis=-2).tolist()
    assert kmax.double().numpy().tolist() == k.double().numpy().max(axis=-2).tolist()


@BOTH
def test_strided_keys(implementation: ModuleType) -> None:
    k = torch.randn(4, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    turned = k.permute(2, 0, 3, 1)
    kmin, kmax = implementation.page_bounds(turned)
    assert kmin.equal(k.amin(3).permute(2, 0, 1))
    assert kmax.equal(k.amax(3).permute(2, 0, 1))


@BOTH
def test_bounds_share_no_memory_with_the_keys(implementation: ModuleType) -> None:
    k = torch.ones(3, 1, 4)
    kmin, kmax = implementation.page_bounds(k)
    k.zero_()
    assert kmin.equal(torch.ones(3, 4))
    assert kmax.equal(torch.ones(3, 4))


@pytest.mark.parametrize("shape", [(4,), (3, 0, 4)])
def test_pages_without_slots_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\[\.\.\., P, D\] with at least one slot, got \["):
        page_bounds(torch.zeros(shape))
