"""A number in place of the greatest logit: used where it is near, noticed and computed again where it is not."""

from collections.abc import Callable

import pytest
import torch

from kvtier.kernels.gather_attention import attend_pages, attend_run, blocked
from kvtier.types import Partial

Oracle = Callable[..., Partial]
Check = Callable[[Partial, Partial, torch.dtype], None]


def problem(dtype: torch.dtype, reach: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys whose logits under scale 1 go about as far as ``reach`` to both sides."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, 8, generator=generator) for heads, tokens in ((4, 2), (2, 700), (2, 700)))
    k *= reach / float((q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT).abs().max())
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every span: whether the one pass gave the answer."""
    found: list[bool] = []
    one_pass = blocked.unified_part

    def watched(*args: object, **kwargs: object) -> Partial | None:
        part = one_pass(*args, **kwargs)  # type: ignore[arg-type]
        found.append(part is not None)
        return part

    monkeypatch.setattr(blocked, "unified_part", watched)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unified_max", [0.0, 6.0, -20.0, 30])
def test_a_near_number_serves(
    unified_max: float, dtype: torch.dtype, answers: list[bool], oracle: Oracle, check: Check
) -> None:
    q, k, v = problem(dtype, 10.0)
    check(attend_run(q, k, v, scale=1.0, unified_max=unified_max), oracle(q, k, v, scale=1.0), dtype)
    assert answers
    assert all(answers)


@pytest.mark.parametrize("unified_max", [-100.0, 200.0, float("nan")])
@pytest.mark.parametrize("cache_bytes", [1024, 2**22])
def test_a_far_number_is_noticed_and_the_answer_is_that_of_no_number(
    unified_max: float, cache_bytes: int, answers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(blocked, "fused_fits", lambda *_: False)
    q, k, v = problem(torch.float32, 60.0)
    got, usual = attend_run(q, k, v, scale=1.0, unified_max=unified_max), attend_run(q, k, v, scale=1.0)
    assert answers
    assert not any(answers)
    assert got.out.equal(usual.out)
    assert got.lse.equal(usual.lse)


def test_logits_on_both_sides_of_the_range_are_exact(answers: list[bool], oracle: Oracle, check: Check) -> None:
    """One query's greatest logit is near, another's far below: the whole span is computed again."""
    q, k, v = problem(torch.float32, 40.0)
    q[:, :, 1] = 0
    bias = torch.full((2, 2, 700), -80.0)
    bias[0] = 0.0
    got = attend_run(q, k, v, scale=1.0, bias=bias, unified_max=0.0)
    extras = blocked.Extras(bias=bias)
    check(got, oracle(q, k, v, scale=1.0, extras=extras), torch.float32)
    assert answers == [False]


def test_over_pages_and_under_a_softcap(answers: list[bool], oracle: Oracle, check: Check) -> None:
    q, k, v = problem(torch.float32, 90.0)
    frames = torch.arange(2 * 2 * 50).view(2, 2, 50)
    arenas = (x.reshape(-1, 14, 8) for x in (k, v))
    got = attend_pages(q, *arenas, frames, scale=1.0, softcap=9.0, unified_max=5.0)
    check(got, oracle(q, k, v, scale=1.0, softcap=9.0), torch.float32)
    assert all(answers)
