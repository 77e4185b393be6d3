"""Names to implementations, resolved when first used: built-ins by table, third parties by entry point."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from kvtier.errors import ConfigError, MissingDependencyError

__all__ = ["Entry", "Registry", "policies", "record_stores", "storage_backends"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a name leads: ``"package.module:Attribute"``, and what to install when the import fails."""

    target: str
    hint: str = ""


@dataclass(slots=True)
class Registry:
    """A table of lazy names.

    Parameters
    ----------
    kind : str
        What the names are, for messages: ``"policy"``.
    group : str
        Entry-point group that third-party packages publish under.
    """

    kind: str
    group: str
    entries: dict[str, Entry] = field(default_factory=dict)

    def register(self, name: str, target: str, hint: str = "") -> None:
        """Add a name.

        Raises
        ------
        ConfigError
            When the name is taken by another target.
        """
        if name in self.entries and self.entries[name].target != target:
            raise ConfigError(f"{self.kind} {name!r} is already registered as {self.entries[name].target}")
        self.entries[name] = Entry(target, hint)

    def names(self) -> list[str]:
        """All names, built-in and third-party, sorted."""
        return sorted(self._table())

    def resolve(self, name: str) -> Any:
        """The object behind a name.

        Raises
        ------
        ConfigError
            For an unknown name, with what exists and the nearest spelling; for a target that does not exist.
        MissingDependencyError
            When its module needs a package that is not installed.
        """
        table = self._table()
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(table))}{meant}")
        entry = table[name]
        module, _, attribute = entry.target.partition(":")
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            hint = entry.hint or f"install the package that provides {error.name or module}"
            raise MissingDependencyError(f"{self.kind} {name!r} could not be imported ({error}); {hint}") from error
        if not attribute or not hasattr(loaded, attribute):
            raise ConfigError(f"{self.kind} {name!r} leads to {entry.target!r}, which does not exist; fix its target")
        return getattr(loaded, attribute)

    def _table(self) -> dict[str, Entry]:
        table = {point.name: Entry(point.value) for point in entry_points(group=self.group)}
        clash = sorted(table.keys() & self.entries.keys())
        if clash:
            raise ConfigError(f"an installed package redefines the built-in {self.kind} {clash[0]!r}; rename it there")
        return table | self.entries


policies = Registry(
    kind="policy",
    group="kvtier.policies",
    entries={
        "full": Entry("kvtier.policies.full:Full"),
        "adakv": Entry("kvtier.policies.eviction.adakv:AdaKV"),
        "adapyramidkv": Entry("kvtier.policies.eviction.adakv:AdaPyramidKV"),
        "d2o": Entry("kvtier.policies.eviction.d2o:D2O"),
        "expected_attention": Entry("kvtier.policies.eviction.expected_attention:ExpectedAttention"),
        "h2o": Entry("kvtier.policies.eviction.h2o:H2O"),
        "pyramidkv": Entry("kvtier.policies.eviction.pyramidkv:PyramidKV"),
        "snapkv": Entry("kvtier.policies.eviction.snapkv:SnapKV"),
        "streamingllm": Entry("kvtier.policies.eviction.streamingllm:StreamingLLM"),
        "tova": Entry("kvtier.policies.eviction.tova:TOVA"),
        "quest": Entry("kvtier.policies.retrieval.quest:Quest"),
        "gemfilter": Entry("kvtier.policies.prompt.gemfilter:GemFilter"),
        "surprisal": Entry("kvtier.policies.prompt.surprisal:Surprisal"),
        "lru": Entry("kvtier.policies.placement.lru:LRU"),
        "arc": Entry("kvtier.policies.placement.arc:ARC"),
        "s3fifo": Entry("kvtier.policies.placement.s3fifo:S3FIFO"),
        "lfu": Entry("kvtier.policies.placement.lfu:LFU"),
    },
)

storage_backends = Registry(
    kind="storage backend",
    group="kvtier.storage_backends",
    entries={
        "host": Entry("kvtier.storage_backends.host:HostSlots"),
        "spill": Entry("kvtier.storage_backends.spill_file:SpillFile"),
    },
)

record_stores = Registry(
    kind="record store",
    group="kvtier.record_stores",
    entries={
        "host": Entry("kvtier.storage_backends.record_tiers:open_host"),
        "segment": Entry("kvtier.storage_backends.record_tiers:open_segment"),
        "files": Entry("kvtier.storage_backends.record_tiers:open_files"),
    },
)
