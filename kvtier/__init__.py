"""kvtier: the memory system under a long-context language model.

The public names are loaded when they are first used: ``import kvtier`` itself imports nothing but the standard library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "D2O",
    "H2O",
    "TOVA",
    "AdaKV",
    "AdaPyramidKV",
    "Budgets",
    "CapacityError",
    "CompositionError",
    "ConfigError",
    "DamagedSlotsError",
    "Full",
    "GemFilter",
    "Hit",
    "InputError",
    "KVChunk",
    "KVLayout",
    "KVTierError",
    "LayerLayout",
    "MaskError",
    "Memory",
    "MissingDependencyError",
    "Namespace",
    "PagesLostError",
    "PolicyError",
    "PutReport",
    "PyramidKV",
    "Quest",
    "RecomputeRate",
    "RecordFormatError",
    "RecordVersionError",
    "Session",
    "SessionStateError",
    "SnapKV",
    "StorageError",
    "Store",
    "StoreConfig",
    "StoreInUseError",
    "StoreStats",
    "StreamingLLM",
    "Surprisal",
    "TenantConfig",
    "TierConfig",
    "UnsupportedModelError",
    "__version__",
    "fingerprint",
    "open_store",
    "patch",
    "policy",
]

if TYPE_CHECKING:
    from kvtier.config import StoreConfig, TenantConfig, TierConfig
    from kvtier.core.chunks import KVChunk
    from kvtier.core.compose import policy
    from kvtier.core.hit import Hit
    from kvtier.core.load_worth import RecomputeRate
    from kvtier.core.memory import Memory
    from kvtier.core.namespace import Namespace
    from kvtier.core.session import Session
    from kvtier.core.store import Store, open_store
    from kvtier.core.store_stats import PutReport, StoreStats
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
        RecordFormatError,
        RecordVersionError,
        SessionStateError,
        StorageError,
        StoreInUseError,
        UnsupportedModelError,
    )
    from kvtier.integrations.hf.fingerprint import fingerprint
    from kvtier.integrations.hf.patch import patch
    from kvtier.policies.eviction.adakv import AdaKV, AdaPyramidKV
    from kvtier.policies.eviction.d2o import D2O
    from kvtier.policies.eviction.h2o import H2O
    from kvtier.policies.eviction.pyramidkv import PyramidKV
    from kvtier.policies.eviction.snapkv import SnapKV
    from kvtier.policies.eviction.streamingllm import StreamingLLM
    from kvtier.policies.eviction.tova import TOVA
    from kvtier.policies.full import Full
    from kvtier.policies.prompt.gemfilter import GemFilter
    from kvtier.policies.prompt.surprisal import Surprisal
    from kvtier.policies.retrieval.quest import Quest
    from kvtier.types import Budgets, KVLayout, LayerLayout
else:
    # At run time only: a module `__getattr__` would make type checkers believe every misspelt name.
    _HOMES = {
        "AdaKV": "kvtier.policies.eviction.adakv",
        "AdaPyramidKV": "kvtier.policies.eviction.adakv",
        "Budgets": "kvtier.types",
        "D2O": "kvtier.policies.eviction.d2o",
        "Full": "kvtier.policies.full",
        "GemFilter": "kvtier.policies.prompt.gemfilter",
        "H2O": "kvtier.policies.eviction.h2o",
        "Hit": "kvtier.core.hit",
        "KVChunk": "kvtier.core.chunks",
        "KVLayout": "kvtier.types",
        "LayerLayout": "kvtier.types",
        "Memory": "kvtier.core.memory",
        "Namespace": "kvtier.core.namespace",
        "PutReport": "kvtier.core.store_stats",
        "PyramidKV": "kvtier.policies.eviction.pyramidkv",
        "Quest": "kvtier.policies.retrieval.quest",
        "RecomputeRate": "kvtier.core.load_worth",
        "Session": "kvtier.core.session",
        "SnapKV": "kvtier.policies.eviction.snapkv",
        "Store": "kvtier.core.store",
        "StoreConfig": "kvtier.config",
        "StoreStats": "kvtier.core.store_stats",
        "StreamingLLM": "kvtier.policies.eviction.streamingllm",
        "Surprisal": "kvtier.policies.prompt.surprisal",
        "TOVA": "kvtier.policies.eviction.tova",
        "TenantConfig": "kvtier.config",
        "TierConfig": "kvtier.config",
        "fingerprint": "kvtier.integrations.hf.fingerprint",
        "open_store": "kvtier.core.store",
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
