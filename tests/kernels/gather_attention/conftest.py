"""Attention is compared with a dense fp64 softmax, at the measured block sizes and at tiny ones."""

from collections.abc import Callable, Iterator

import pytest
import torch

from kvtier.kernels.gather_attention import blocked, streamed
from kvtier.kernels.gather_attention.extras import PLAIN, Extras
from kvtier.kernels.gather_attention.table import BreakEven
from kvtier.types import Partial, Visibility

LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
TINY = {
    "VIEWS": BreakEven(rows=4, key_bytes=1024),
    "COPIES": BreakEven(rows=6, key_bytes=1024),
    "FUSED_ROWS": 8,
    "BLOCK": 8,
    "CACHE_BYTES": 1024,
    "SCRATCH_BYTES": 4096,
    "PARTS_HELD": 3,
}


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
    extras: Extras = PLAIN,
) -> Partial:
    """Softmax attention in fp64, one batch row and one query head at a time."""
    batch, heads, queries, _ = q.shape
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv_head = h * k.shape[1] // heads
            logits = q[b, h].double() @ k[b, kv_head].double().T * scale
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            if visible is not None:
                at = visible.q_pos[b][:, None]
                place = visible.k_pos[b, kv_head if visible.k_pos.shape[1] > 1 else 0][None, :]
                hidden = place > at
                if visible.window is not None:
                    hidden |= place <= at - visible.window
                logits[hidden] = -torch.inf
            keys = k.shape[2]
            if extras.bias is not None:
                logits = logits + extras.bias[b, h * extras.bias.shape[1] // heads].double()
            if extras.tree is not None:
                for i, word in enumerate(extras.tree.ancestors[b].tolist()):
                    bits = f"{word % 2**64:064b}"[::-1]
                    for j in range(extras.tree.first, keys):
                        if bits[j - extras.tree.first] == "0":
                            logits[i, j] = -torch.inf
            if extras.lengths is not None:
                keys = int(extras.lengths[b, kv_head])
            logits = logits[:, :keys]
            sees = ~logits.isneginf().all(1)
            lse[b, h, sees] = logits[sees].logsumexp(1)
            out[b, h, sees] = logits[sees].softmax(1) @ v[b, kv_head, :keys].double()
    return Partial(out, lse)


def assert_near(got: Partial, expected: Partial, dtype: torch.dtype) -> None:
    """``out`` and ``lse`` within the limit for inputs of ``dtype``; queries without keys exactly ``(0, -inf)``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.out.dtype == got.lse.dtype == wide
    assert got.out.shape == expected.out.shape
    assert got.lse.shape == expected.lse.shape
    blind = expected.lse.isneginf()
    assert got.lse.isneginf().equal(blind)
    assert not got.out[blind].any()
    torch.testing.assert_close(got.out.double(), expected.out, rtol=0, atol=LIMITS[dtype])
    torch.testing.assert_close(got.lse.double(), expected.lse, rtol=0, atol=LIMITS[dtype])


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Partial]:
    return dense


@pytest.fixture(scope="session")
def check() -> Callable[[Partial, Partial, torch.dtype], None]:
    return assert_near


@pytest.fixture(scope="module")
def tiny_blocks() -> Iterator[None]:
    """Every path, loop and edge of the blocked form on problems of a few dozen keys."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in TINY.items():
            patch.setattr(blocked, name, size)
        patch.setattr(streamed, "DIRECT_ROWS", 2)
        yield


@pytest.fixture(scope="module", params=["fused", "streamed"])
def engine(request: pytest.FixtureRequest, tiny_blocks: None) -> Iterator[str]:
    """The blocked form with tiny blocks, with torch's fused kernel and as if this torch had none."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "streamed":
            patch.setattr(blocked, "fused_fits", lambda *_: False)
        yield request.param
