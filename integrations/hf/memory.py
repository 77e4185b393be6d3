"""A memory for a model, from the arguments of ``patch``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvtier.config import load_config
from kvtier.types import Budgets, KVLayout, parse_bytes

if TYPE_CHECKING:
    from kvtier.config import StoreConfig
    from kvtier.core.policy import Policy
    from kvtier.integrations.hf.sessions import Memory

__all__ = ["open_memory"]


def open_memory(
    layout: KVLayout,
    devices: tuple[torch.device, ...],
    *,
    policy: str | Policy,
    keep: int | None,
    read: int | None,
    device: int | str | None,
    store: StoreConfig | Mapping[str, Any] | str | Path | None,
    tenant: str,
) -> Memory:
    """Open the tiers of ``store`` for a model and bind the policy to it; the caller closes the memory.

    Raises
    ------
    ConfigError
        For a policy, budget or store that is wrong or does not fit the model.
    """
    from kvtier.core.compose import policy as read_policy
    from kvtier.core.memory import Memory as CoreMemory

    config = load_config(store)
    budgets = Budgets(keep=keep, read=read, device=None if device is None else parse_bytes(device))
    layout = replace(
        layout,
        page_tokens=config.page_tokens,
        block_tokens=config.block_tokens,
        chunk_tokens=config.block_tokens * max(1, layout.chunk_tokens // config.block_tokens),
    )
    return CoreMemory(layout, read_policy(policy), budgets, config, devices, tenant=tenant)
