"""A decode step under a retrieval policy attends to exactly the pages that were chosen, and to the tail."""

from __future__ import annotations

import pytest
import torch

from kvtier.config import load_config
from kvtier.core.compose import policy
from kvtier.core.memory import Memory
from kvtier.types import Budgets, KVLayout

HEADS, GROUP, DIM, PAGE = 2, 2, 6, 4
SCALE = 0.4


def softmax_over(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention [Hq, D] of query [Hq, D] over keys and values [Hk][n, D] of its KV head."""
    rows = []
    for head in range(HEADS * GROUP):
        logits = keys[head // GROUP] @ query[head] * SCALE
        rows.append(torch.softmax(logits, 0) @ values[head // GROUP])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("prompts", "device"),
    [([96], None), ([40, 72, 24, 136], None), ([40, 72, 24, 136], 60_000)],
    ids=["one slab", "several slabs", "tiered"],
)
def test_chosen_pages_and_tail(prompts: list[int], device: int | None) -> None:
    layout = KVLayout.uniform(
        num_layers=1,
        num_query_heads=HEADS * GROUP,
        num_kv_heads=HEADS,
        key_dim=DIM,
        value_dim=DIM,
        dtype="float64",
        page_tokens=PAGE,
        block_tokens=8,
        chunk_tokens=16,
    )
    config = load_config(
        {
            "tiers": [{"name": "host", "backend": "host", "capacity": "1MiB"}],
            "page_tokens": PAGE,
            "block_tokens": 8,
        }
    )
    memory = Memory(layout, policy("quest(dense_layers=0, read=40)"), Budgets(device=device), config)
    random = torch.Generator().manual_seed(0)
    session, seen, parts = memory.session(), 0, []
    for tokens in [*prompts, 1, 1, 1, 1, 1, 1, 1, 1, 1]:
        keys, values = torch.randn(2, 1, HEADS, tokens, DIM, generator=random, dtype=torch.float64)
        query = torch.randn(1, HEADS * GROUP, tokens, DIM, generator=random, dtype=torch.float64)
        positions = torch.arange(seen, seen + tokens)[None]
        session.append(0, keys, values, positions)
        out = session.attend(0, query, positions, scale=SCALE)
        parts.append((keys[0], values[0]))
        seen += tokens
        if tokens > 1:
            continue
        sequence = session._batch.rows[0][0]
        all_keys, all_values = (torch.cat([part[side] for part in parts], dim=1) for side in (0, 1))
        wanted = []
        for head in range(HEADS):
            slots = [column * PAGE + slot for column in sequence.chosen[0, head].tolist() for slot in range(PAGE)]
            wanted.append(slots + list(range(sequence.sealed, seen)))
        assert len(wanted[0]) <= 40
        expected = softmax_over(
            query[0, :, 0],
            [all_keys[head, wanted[head]] for head in range(HEADS)],
            [all_values[head, wanted[head]] for head in range(HEADS)],
        )

        torch.testing.assert_close(out[0, :, 0], expected, rtol=0, atol=1e-12)
    assert (memory.groups[0].arena.slabs > 1) == (len(prompts) > 1 and device is None)
    session.close()
    memory.close()
