"""What type checkers must see through the lazy names of ``kvtier``; read by mypy in ``make lint``, never run."""

from typing import assert_type

import kvtier

layout = kvtier.KVLayout.uniform(num_layers=2, num_kv_heads=2, key_dim=16, value_dim=16, dtype="float32")
assert_type(layout, kvtier.KVLayout)
assert_type(layout.layers, tuple[kvtier.LayerLayout, ...])
assert_type(kvtier.Budgets(read=512).read, int | None)
assert_type(kvtier.StoreConfig().tiers, tuple[kvtier.TierConfig, ...])
assert_type(kvtier.SnapKV(window=32).window, int)
assert_type(kvtier.__version__, str)

with kvtier.open_store({"tiers": []}) as store:
    assert_type(store, kvtier.Store)
    space = store.namespace(model="m", layout=layout, tenant="team-a", extra={"lora": None, "images": [b"x"]})
    assert_type(space.put([1, 2], []), kvtier.PutReport)
    with space.match([1, 2], recompute=kvtier.RecomputeRate(tokens_per_second=1e3)) as hit:
        assert_type(hit, kvtier.Hit)
        assert_type(hit.load(layers=range(2)), list[kvtier.KVChunk])
    assert_type(store.stats(), kvtier.StoreStats)

# An unused "ignore" is an error: each of these lines must stay one.
misspelt = kvtier.pach  # type: ignore[attr-defined]
kvtier.Budgets(reed=512)  # type: ignore[call-arg]
kvtier.KVLayout.uniform(  # type: ignore[call-arg]
    num_layers=2, num_kv_heads=2, key_dim=16, value_dim=16
)
