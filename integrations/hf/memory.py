"""A memory and a store for a model, from the arguments of ``patch``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvtier.config import load_config
from kvtier.core.session_tiers import SessionTiers
from kvtier.core.store import Store, open_store
from kvtier.types import Budgets, KVLayout

if TYPE_CHECKING:
    from kvtier.config import StoreConfig
    from kvtier.core.memory import Memory
    from kvtier.core.policy import Policy

__all__ = ["open_memory", "open_prefix_store"]

_FOR_SESSIONS = ("host", "spill")


def open_memory(
    layout: KVLayout,
    devices: tuple[torch.device, ...],
    policy: str | Policy,
    budgets: Budgets,
    store: Store | StoreConfig | Mapping[str, Any] | str | Path | None,
    *,
    tenant: str,
) -> Memory:
    """Open the tiers of live sessions for a model and bind the policy to it; the caller closes the memory.

    Raises
    ------
    ConfigError
        For a policy, budget or store that is wrong or does not fit the model.
    """
    from kvtier.core.compose import policy as read_policy
    from kvtier.core.memory import Memory as CoreMemory

    config = store.config if isinstance(store, Store) else load_config(store)
    layout = replace(
        layout,
        page_tokens=config.page_tokens,
        block_tokens=config.block_tokens,
        chunk_tokens=config.chunk_tokens or config.block_tokens * max(1, layout.chunk_tokens // config.block_tokens),
    )
    tiers = _beside(store, budgets) if isinstance(store, Store) else config
    try:
        return CoreMemory(layout, read_policy(policy), budgets, tiers, devices, tenant=tenant)
    except BaseException:
        if isinstance(tiers, SessionTiers):
            tiers.close()
        raise


def open_prefix_store(store: Store | StoreConfig | Mapping[str, Any] | str | Path | None) -> Store | None:
    """The store that a configuration names, opened; None when it has no tier that outlives a process, or is open."""
    if isinstance(store, Store) or store is None:
        return None
    config = load_config(store)
    lasting = any(tier.backend not in _FOR_SESSIONS for tier in config.tiers)
    return open_store(config) if lasting else None


def _beside(store: Store, budgets: Budgets) -> SessionTiers | StoreConfig:
    """Where the sessions over a store put what leaves the device; nowhere, when nothing ever does."""
    if budgets.device is None:
        return store.config.model_copy(update={"tiers": ()})
    shared = store.session_tiers()
    if shared.capacities:
        return shared
    shared.close()
    return store.config.model_copy(update={"tiers": load_config(None).tiers})
