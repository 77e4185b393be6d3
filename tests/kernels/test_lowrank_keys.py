"""Keys from low-rank factors: those of a dense product, rotated as the model rotates; nothing else is read."""

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.lowrank_keys import Rotation, blocked, lowrank_keys, reference, rotary_tables
from kvtier.testing.lowrank_problems import LowRankProblem

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Of the arithmetic, and relative of the one rounding to the type of u.
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
BOTH = pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])


def dense(problem: LowRankProblem) -> torch.Tensor:
    """One token, one head and one pair of channels after the other, in fp64."""
    u, sv, positions, pages, (cos, sin) = problem.arguments()
    batch, kv_heads, count, slots = problem.sizes
    half = problem.turned // 2
    keys = torch.zeros(batch, kv_heads, count * slots, problem.dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(kv_heads):
            for n in range(count * slots):
                token = int(pages[b, h, n // slots]) * slots + n % slots
                key = (u[b, token].double() @ sv[b, h].double()).tolist()
                for c in range(half):
                    turn = complex(float(cos[positions[b, token], c]), float(sin[positions[b, token], c]))
                    pair = complex(key[c], key[c + half]) * turn
                    key[c], key[c + half] = pair.real, pair.imag
                keys[b, h, n] = torch.tensor(key, dtype=torch.float64)
    return keys


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=ROUNDING[dtype], atol=LIMITS[dtype])


@st.composite
def problems(draw: st.DrawFn) -> LowRankProblem:
    dim = draw(st.sampled_from([2, 8, 14]))
    return LowRankProblem(
        sizes=(draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 4))),
        rank=draw(st.integers(1, 9)),
        dim=dim,
        turned=2 * draw(st.integers(0, dim // 2)),
        dtype=draw(st.sampled_from(DTYPES)),
        device=CPU,
        seed=draw(st.integers(0, 2**20)),
    )


@BOTH
@given(problem=problems())
def test_the_formula(implementation: ModuleType, problem: LowRankProblem) -> None:
    got = implementation.lowrank_keys(*problem.arguments(), page_tokens=problem.sizes[3])
    assert_near(got, dense(problem), problem.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CACHE_BYTES", 1)
    problem = LowRankProblem(sizes=(2, 2, 50, 3), rank=5, dim=8, turned=8, dtype=dtype, device=CPU)
    assert_near(lowrank_keys(*problem.arguments(), page_tokens=3), dense(problem), dtype)


@given(problems(), st.data())
def test_the_order_of_pages_is_that_of_their_keys(problem: LowRankProblem, data: st.DataObject) -> None:
    u, sv, positions, pages, rotation = problem.arguments()
    slots = problem.sizes[3]
    turn = data.draw(st.permutations(range(pages.shape[2])))
    whole = lowrank_keys(u, sv, positions, pages, rotation, page_tokens=slots).unflatten(2, (-1, slots))
    turned = lowrank_keys(u, sv, positions, pages[:, :, turn], rotation, page_tokens=slots).unflatten(2, (-1, slots))
    torch.testing.assert_close(turned, whole[:, :, turn], rtol=ROUNDING[problem.dtype] * 2, atol=1e-5)


@given(problems())
def test_a_page_is_its_tokens(problem: LowRankProblem) -> None:
    u, sv, positions, pages, rotation = problem.arguments()
    slots = problem.sizes[3]
    tokens = (pages.unsqueeze(-1) * slots + torch.arange(slots)).flatten(2)
    by_page = lowrank_keys(u, sv, positions, pages, rotation, page_tokens=slots)
    assert by_page.equal(lowrank_keys(u, sv, positions, tokens, rotation))


def test_a_logit_depends_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    u, sv = torch.randn(1, 1, 6, generator=generator).double(), torch.randn(1, 1, 6, 16, generator=generator).double()
    rotation = rotary_tables(torch.logspace(0, -4, 8, dtype=torch.float64), 5000)
    first = torch.zeros(1, 1, 1, dtype=torch.int64)

    def key(position: int) -> torch.Tensor:
        return lowrank_keys(u, sv, torch.tensor([[position]]), first, rotation)[0, 0, 0]

    assert math.isclose(float(key(7) @ key(40)), float(key(4907) @ key(4940)), rel_tol=1e-9)


def test_full_rank_factors_give_the_keys_that_were_factored() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(40, 3 * 8, generator=generator, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(plain, full_matrices=False)
    sv = (s.unsqueeze(1) * vt).view(-1, 3, 8).transpose(0, 1)
    still = Rotation(torch.ones(40, 4, dtype=torch.float64), torch.zeros(40, 4, dtype=torch.float64))
    tokens = torch.randperm(40, generator=generator)[:9].expand(1, 3, 9)
    got = lowrank_keys(u[None], sv[None], torch.arange(40)[None], tokens, still)
    torch.testing.assert_close(got[0], plain.view(40, 3, 8).transpose(0, 1)[:, tokens[0, 0]], rtol=0, atol=1e-12)


def test_tables_are_those_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=16)
    embedding = llama.LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.arange(500)[None])
    tables = rotary_tables(embedding.inv_freq, 500, scaling=embedding.attention_scaling)
    assert tables.cos.equal(cos[0, :, :8])
    assert tables.sin.equal(sin[0, :, :8])
    keys = torch.randn(1, 2, 500, 16, generator=torch.Generator().manual_seed(0))
    _, rotated = llama.apply_rotary_pos_emb(keys, keys, cos, sin)
    tokens = torch.arange(500).expand(1, 2, 500)
    basis = torch.eye(32).view(1, 32, 2, 16).transpose(1, 2)
    got = lowrank_keys(keys.transpose(1, 2).flatten(2), basis, torch.arange(500)[None], tokens, tables)
    torch.testing.assert_close(got, rotated, rtol=0, atol=1e-5)


def test_a_token_that_does_not_exist_is_refused() -> None:
    u, sv, positions, pages, rotation = LowRankProblem(
        sizes=(1, 2, 3, 2), rank=4, dim=8, turned=8, dtype=torch.float32, device=CPU
    ).arguments()
    with pytest.raises(IndexError):
        lowrank_keys(u, sv, positions, pages + 8, rotation, page_tokens=2)


@pytest.mark.parametrize(
    "wrong", ["u", "sv", "positions", "pages", "page type", "tables", "odd dim", "wide tables", "page_tokens"]
)
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    u, sv, positions, pages, rotation = LowRankProblem(
        sizes=(1, 2, 3, 2), rank=4, dim=8, turned=8, dtype=torch.float32, device=CPU
    ).arguments()
    wide = Rotation(torch.zeros(9, 5), torch.zeros(9, 5))
    arguments = {
        "u": (u[..., :3], sv, positions, pages, rotation),
        "sv": (u, sv[:, :1], positions, pages, rotation),
        "positions": (u, sv, positions[:, 1:], pages, rotation),
        "pages": (u, sv, positions, pages[0], rotation),
        "page type": (u, sv, positions, pages.int(), rotation),
        "tables": (u, sv, positions, pages, Rotation(rotation.cos[1:], rotation.sin)),
        "odd dim": (u, sv[..., :7], positions, pages, rotation),
        "wide tables": (u, sv, positions, pages, wide),
        "page_tokens": (u, sv, positions, pages, rotation),
    }[wrong]
    with pytest.raises(InputError, match=r"lowrank_keys needs u \[B, T, r\].* got \["):
        lowrank_keys(*arguments, page_tokens=0 if wrong == "page_tokens" else 2)


def test_frequencies_that_are_no_row_are_refused() -> None:
    with pytest.raises(InputError, match=r"rotary_tables needs inv_freq \[R / 2\]"):
        rotary_tables(torch.zeros(2, 3), 5)
