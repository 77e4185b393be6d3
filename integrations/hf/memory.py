"""A memory and a store for a model, from the arguments of ``patch``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvtier.config import load_config
from kvtier.core.store import Store, open_store
from kvtier.types import Budgets, KVLayout, parse_bytes

if TYPE_CHECKING:
    from kvtier.config import StoreConfig, TierConfig
    from kvtier.core.memory import Memory
    from kvtier.core.policy import Policy

__all__ = ["open_memory", "open_prefix_store"]

_FOR_SESSIONS = ("host", "spill")


def open_memory(
    layout: KVLayout,
    devices: tuple[torch.device, ...],
    *,
    policy: str | Policy,
    keep: int | None,
    read: int | None,
    device: int | str | None,
    store: Store | StoreConfig | Mapping[str, Any] | str | Path | None,
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
    budgets = Budgets(keep=keep, read=read, device=None if device is None else parse_bytes(device))
    layout = replace(
        layout,
        page_tokens=config.page_tokens,
        block_tokens=config.block_tokens,
        chunk_tokens=config.chunk_tokens or config.block_tokens * max(1, layout.chunk_tokens // config.block_tokens),
    )
    tiers = _session_tiers(config, beside_store=isinstance(store, Store) or _stores_prefixes(config))
    return CoreMemory(layout, read_policy(policy), budgets, tiers, devices, tenant=tenant)


def open_prefix_store(store: Store | StoreConfig | Mapping[str, Any] | str | Path | None) -> Store | None:
    """The store of prefixes that a configuration names, opened; None when it has no tier that outlives a process."""
    if isinstance(store, Store) or store is None:
        return None
    config = load_config(store)
    if not _stores_prefixes(config):
        return None
    return open_store(config.model_copy(update={"tiers": tuple(_shared(tier) for tier in config.tiers)}))


def _stores_prefixes(config: StoreConfig) -> bool:
    return any(tier.backend not in _FOR_SESSIONS for tier in config.tiers)


def _session_tiers(config: StoreConfig, *, beside_store: bool) -> StoreConfig:
    """What live sessions take of the tiers: all that is theirs, and a share of host memory beside a store."""
    if not beside_store:
        return config
    mine = tuple(_own(tier) for tier in config.tiers if tier.backend in _FOR_SESSIONS)
    if not mine:
        return config.model_copy(update={"tiers": load_config(None).tiers})
    return config.model_copy(update={"tiers": mine})


def _own(tier: TierConfig) -> TierConfig:
    """A tier as sessions open it beside a store."""
    if tier.backend != "host":
        return tier
    return tier.model_copy(update={"capacity": tier.sessions or max(1, tier.capacity // 2), "sessions": None})


def _shared(tier: TierConfig) -> TierConfig:
    """A tier as the store opens it beside sessions."""
    if tier.backend != "host":
        return tier
    left = tier.capacity - (tier.sessions or tier.capacity // 2)
    return tier.model_copy(update={"capacity": max(1, left), "sessions": None})
