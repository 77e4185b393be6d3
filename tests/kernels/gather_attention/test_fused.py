"""torch's fused CPU kernel is used only when it is there and right."""

import logging
from typing import Any

import pytest
import torch

from kvtier.kernels.gather_attention import attend_run, fused


@pytest.fixture(autouse=True)
def tried_anew() -> Any:
    fused._trusted.cache_clear()
    yield
    fused._trusted.cache_clear()


Q = torch.zeros(1, 2, 1, 8)


def test_this_torch_has_it_and_it_is_right() -> None:
    assert fused.fused_fits(Q, 8, 8, None)


def test_a_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert fused.fused_fits(Q, 8, 8, None)


@pytest.mark.parametrize(("value_dim", "softcap"), [(9, None), (8, 30.0)])
def test_what_it_cannot_do_is_left_to_others(value_dim: int, softcap: float | None) -> None:
    assert not fused.fused_fits(Q, 8, value_dim, softcap)


def test_other_devices_do_not_have_it() -> None:
    assert not fused.fused_fits(Q.to("meta"), 8, 8, None)


def test_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_attention", None)
    assert not fused.fused_fits(Q, 8, 8, None)


def test_another_signature(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def renamed(query: torch.Tensor) -> None:
        raise AssertionError(query)

    monkeypatch.setattr(fused, "_attention", renamed)
    with caplog.at_level(logging.INFO, "kvtier.kernels"):
        assert not fused.fused_fits(Q, 8, 8, None)
    assert "is not used" in caplog.text


@pytest.mark.parametrize("fault", ["out", "lse", "masks are forgotten", "causal is forgotten"])
def test_wrong_answers_are_found(fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = fused._attention

    def wrong(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout: float,
        causal: bool,
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if fault == "masks are forgotten":
            attn_mask = None
        out, lse = right(q, k, v, dropout, causal and fault != "causal is forgotten", attn_mask=attn_mask, scale=scale)
        return out * (1.01 if fault == "out" else 1), lse + (0.01 if fault == "lse" else 0)

    monkeypatch.setattr(fused, "_attention", wrong)
    assert not fused.fused_fits(Q, 8, 8, None)
    assert "the answers are wrong" in caplog.text


def test_attention_without_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 70, 16, generator=generator) for heads in (4, 2, 2))
    with_it = attend_run(q, k, v, scale=0.25)
    monkeypatch.setattr(fused, "_attention", None)
    fused._trusted.cache_clear()
    without = attend_run(q, k, v, scale=0.25)
    torch.testing.assert_close(without.out, with_it.out, rtol=0, atol=1e-6)
    torch.testing.assert_close(without.lse, with_it.lse, rtol=0, atol=1e-6)
