"""kvtier: the memory system under a long-context language model.

The public names are loaded when they are first used: ``import kvtier`` itself imports nothing but the standard library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Budgets",
    "CapacityError",
    "CompositionError",
    "ConfigError",
    "DamagedSlotsError",
    "Full",
    "InputError",
    "KVLayout",
    "KVTierError",
    "LayerLayout",
    "MaskError",
    "Memory",
    "MissingDependencyError",
    "PagesLostError",
    "PolicyError",
    "Quest",
    "Session",
    "SessionStateError",
    "SnapKV",
    "StorageError",
    "StoreConfig",
    "TierConfig",
    "UnsupportedModelError",
    "__version__",
    "patch",
    "policy",
]

if TYPE_CHECKING:
    from kvtier.config import StoreConfig, TierConfig
    from kvtier.core.compose import policy
    from kvtier.core.memory import Memory
    from kvtier.core.session import Session
    from kvtier.errors import (
        CapacityError,
        CompositionError,
        ConfigError,
        DamagedSlotsError,
        InputError,
        KVTierError,
        MaskError,
        MissingDependencyError,
        PagesLostError,
        PolicyError,
        SessionStateError,
        StorageError,
        UnsupportedModelError,
    )
    from kvtier.integrations.hf.patch import patch
    from kvtier.policies.eviction.snapkv import SnapKV
    from kvtier.policies.full import Full
    from kvtier.policies.retrieval.quest import Quest
    from kvtier.types import Budgets, KVLayout, LayerLayout
else:
    # At run time only: a module `__getattr__` would make type checkers believe every misspelt name.
    _HOMES = {
        "Budgets": "kvtier.types",
        "Full": "kvtier.policies.full",
        "KVLayout": "kvtier.types",
        "LayerLayout": "kvtier.types",
        "Memory": "kvtier.core.memory",
        "Quest": "kvtier.policies.retrieval.quest",
        "Session": "kvtier.core.session",
        "SnapKV": "kvtier.policies.eviction.snapkv",
        "StoreConfig": "kvtier.config",
        "TierConfig": "kvtier.config",
        "patch": "kvtier.integrations.hf.patch",
        "policy": "kvtier.core.compose",
    } | {name: "kvtier.errors" for name in __all__ if name.endswith("Error")}

    def __getattr__(name: str) -> object:
        """Import a public name from its home when it is first used (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Every public name, loaded or not."""
        return sorted({*globals(), *__all__})
