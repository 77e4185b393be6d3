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

# An unused "ignore" is an error: each of these lines must stay one.
misspelt = kvtier.pach  # type: ignore[attr-defined]
kvtier.Budgets(reed=512)  # type: ignore[call-arg]
kvtier.KVLayout.uniform(  # type: ignore[call-arg]
    num_layers=2, num_kv_heads=2, key_dim=16, value_dim=16
)
