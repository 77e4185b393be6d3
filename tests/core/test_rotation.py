"""Rotations by position, undone, moved on and averaged, against complex numbers; and moments of queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.ledger import Ledger
from kvtier.core.moments import Moments, moments_of
from kvtier.core.rotation import mean_rotation, turned, unrotated
from kvtier.errors import ConfigError
from kvtier.testing.plain_slots import rotate
from kvtier.types import LayerLayout, Rope

ROPES = (Rope(frequencies=(1.0, 0.01)), Rope(frequencies=(0.7, 0.2, 0.003), scaling=1.2), Rope(frequencies=()))
DIM = 7


def vectors(count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_a_model(rope: Rope, plain: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a model of the type of ``plain`` makes of it: cosines and sines rounded to that type."""
    pairs, wide = len(rope.frequencies), torch.float64 if plain.dtype == torch.float64 else torch.float32
    angles = positions.to(wide)[:, None] * torch.tensor(rope.frequencies, dtype=wide)
    cos, sin = ((part * rope.scaling).to(plain.dtype) for part in (angles.cos(), angles.sin()))
    low, high = plain[..., :pairs], plain[..., pairs : 2 * pairs]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, plain[..., 2 * pairs :]], dim=-1)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{len(rope.frequencies)} pairs")
@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
def test_what_a_model_rotated_comes_back(rope: Rope, dtype: torch.dtype, slack: float) -> None:
    plain, positions = vectors(5, dtype), torch.tensor([0, 3, 77, 4097, 131071])
    back = unrotated(rope, as_a_model(rope, plain, positions), positions)

    assert back.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(back.double(), plain.double(), rtol=0, atol=slack * float(plain.double().abs().max()))


@given(
    rope=st.sampled_from(ROPES),
    start=st.integers(0, 10**7),
    tokens=st.lists(st.integers(-(10**7), 10**7), min_size=4, max_size=4),
)
def test_turning_moves_positions_on(rope: Rope, start: int, tokens: list[int]) -> None:
    plain, by, positions = vectors(4), torch.tensor(tokens), torch.arange(start, start + 4)
    got = turned(rope, rotate(rope, plain, positions), by)

    torch.testing.assert_close(got, rotate(rope, plain, positions + by), rtol=0, atol=1e-7)


@given(rope=st.sampled_from(ROPES), first=st.integers(0, 5000), count=st.integers(1, 20))
def test_the_mean_rotation_is_the_mean_of_rotations(rope: Rope, first: int, count: int) -> None:
    plain, positions = vectors(1)[0, 0, 0], torch.arange(first, first + count)
    right = rotate(rope, plain.expand(count, DIM), positions).mean(0)
    right[: 2 * len(rope.frequencies)] *= rope.scaling

    got = mean_rotation(rope, positions, DIM).double() @ plain
    torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    skip=st.integers(0, 12),
    far=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 999),
)
def test_moments_are_the_same_in_any_chunks(chunks: list[int], skip: int, far: float, seed: int) -> None:
    rope, total, ledger = ROPES[1], sum(chunks), Ledger("cpu", None)
    plain = (vectors(total, seed=seed)[:1] + far).clone()
    positions = torch.arange(total)
    queries = as_a_model(rope, plain, positions)
    found: Moments | None = None
    for start, tokens in zip([sum(chunks[:place]) for place in range(len(chunks))], chunks, strict=True):
        part = slice(start, start + tokens)
        found = moments_of(queries[:, :, part], positions[None, part], rope, skip=skip, before=found, ledger=ledger)
    assert found is not None
    assert found.count == max(0, total - skip)
    if found.count:
        taken = plain[0, :, skip:]
        torch.testing.assert_close(found.mean, taken.mean(1), rtol=1e-9, atol=1e-9)
        right = torch.stack([torch.cov(head.T, correction=0) for head in taken])
        torch.testing.assert_close(found.spread / found.count, right, rtol=0, atol=1e-6 if far else 1e-9)
    assert ledger.by_purpose["statistics"] == found.mean.nbytes + found.spread.nbytes
    del found
    assert not ledger.in_use


def test_a_rotation_must_fit_the_keys() -> None:
    with pytest.raises(ConfigError, match="4 rotated pairs do not fit key_dim 6"):
        LayerLayout(
            num_query_heads=1,
            num_kv_heads=1,
            key_dim=6,
            value_dim=6,
            dtype="float32",
            rope=Rope(frequencies=(1.0,) * 4),
        )
    with pytest.raises(ConfigError, match="scaling must be more than 0"):
        Rope(frequencies=(1.0,), scaling=0.0)
