"""Any prompts, in any order, under any policy: what a store brings back never changes a token."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvtier
from kvtier.testing.tiny_models import tiny_model

SIZES: dict[str, Any] = {"page_tokens": 4, "block_tokens": 8, "chunk_tokens": 16}
MODELS = {family: tiny_model(family) for family in ("llama", "gemma3", "gpt_oss")}
STOCK: dict[tuple[str, tuple[tuple[int, ...], ...], int], list[list[int]]] = {}
POLICIES: dict[str, dict[str, int]] = {
    "full": {},
    "snapkv(window=8)": {"keep": 48},
    "quest(dense_layers=0)": {"read": 24},
}
# Texts that share beginnings: a text is a choice of parts, and equal choices are equal tokens.
PARTS = [torch.randint(3, 97, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (7, 16, 33)]


@st.composite
def texts(draw: st.DrawFn) -> tuple[int, ...]:
    choice = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    return tuple(token for part in choice for token in PARTS[part])


def padded(rows: tuple[tuple[int, ...], ...]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def stock(family: str, rows: tuple[tuple[int, ...], ...], tokens: int) -> list[list[int]]:
    key = family, rows, tokens
    if key not in STOCK:
        out = MODELS[family].generate(**padded(rows), do_sample=False, max_new_tokens=tokens)
        STOCK[key] = out.tolist()
    return STOCK[key]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(MODELS)),
    policy=st.sampled_from(sorted(POLICIES)),
    publish_chunks=st.sampled_from([2, 5, 1000]),
    turns=st.lists(
        st.tuples(st.lists(texts(), min_size=1, max_size=3).map(tuple), st.integers(1, 20)), min_size=2, max_size=5
    ),
)
def test_tokens_do_not_depend_on_what_is_stored(
    family: str, policy: str, publish_chunks: int, turns: list[tuple[tuple[tuple[int, ...], ...], int]]
) -> None:
    model = MODELS[family]
    chunk_bytes = 16 * 2 * 2 * 2 * 16 * 4
    config = {
        "tiers": [{"name": "host", "backend": "host", "capacity": "16MiB"}],
        "publish_bytes": publish_chunks * chunk_bytes,
        **SIZES,
    }
    expected = []
    if policy == "full":
        expected = [stock(family, rows, tokens) for rows, tokens in turns]
    else:
        with kvtier.patch(model, policy, store={"tiers": config["tiers"], **SIZES}, **POLICIES[policy]):
            for rows, tokens in turns:
                out = model.generate(**padded(rows), do_sample=False, max_new_tokens=tokens)
                expected.append(out.tolist())
    with kvtier.open_store(config) as store, kvtier.patch(model, policy, store=store, **POLICIES[policy]):
        for (rows, tokens), wanted in zip(turns, expected, strict=True):
            out = model.generate(**padded(rows), do_sample=False, max_new_tokens=tokens)
            assert out.tolist() == wanted
            store.flush()
