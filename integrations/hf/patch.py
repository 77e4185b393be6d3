"""``patch``: put kvtier's memory under a transformers model, and take it away again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from torch import nn

from kvtier.core.store import Store
from kvtier.errors import InputError, SessionStateError
from kvtier.integrations.hf import compat
from kvtier.integrations.hf.attention import adopt, attention, mask, release
from kvtier.integrations.hf.cache import KVTierCache
from kvtier.integrations.hf.calls import PatchedCalls, arguments_by_name
from kvtier.integrations.hf.explanation import Explanation
from kvtier.integrations.hf.filter import PromptFilter
from kvtier.integrations.hf.fingerprint import fingerprint
from kvtier.integrations.hf.layout import layer_devices, layout_of
from kvtier.integrations.hf.memory import open_memory, open_prefix_store
from kvtier.integrations.hf.pool import CachePool
from kvtier.integrations.hf.prefix import PrefixCache
from kvtier.integrations.hf.saving import restore_cache, save_cache
from kvtier.integrations.hf.sessions import Memory, Report
from kvtier.types import Budgets, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtier.config import StoreConfig
    from kvtier.core.filtering import BoundFilter
    from kvtier.core.memory import Memory as CoreMemory
    from kvtier.core.policy import Policy
    from kvtier.types import KVLayout

__all__ = ["PatchHandle", "attach", "patch"]


def patch(
    model: Any,
    policy: str | Policy,
    *,
    keep: int | None = None,
    read: int | None = None,
    device: int | str | None = None,
    store: Store | StoreConfig | Mapping[str, Any] | str | Path | None = None,
    tenant: str = "default",
    explain: bool = False,
) -> PatchHandle:
    """Let a model keep its KV cache in kvtier's tiers, under a policy, and find prompts again that it has seen.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A decoder in eval mode, on any devices. It is changed in place until the handle is removed.
    policy : str or Policy
        ``"full"``, ``"snapkv(window=32) | quest"`` or a Policy.
    keep : int, optional
        Tokens kept per sequence, layer and KV head; or, under a prompt filter alone, prompt tokens that are run.
    read : int, optional
        Tokens read per decode step, layer and KV head.
    device : int or str, optional
        Bytes of device memory, or a size such as ``"1GiB"``.
    store : Store, StoreConfig, dict or path, optional
        The tiers below the device. Over a tier that outlives the process (``segment``, ``files``), or an open store,
        prompts are looked up, and published in the background. An open store may be shared and stays open.
    tenant : str
        Whose data this is: nothing that is stored is shared with another, spill files go into a directory of its own.
    explain : bool
        Log which pages decode steps read, for ``handle.explain()``.

    Returns
    -------
    PatchHandle
        Active at once; leaving it as a context manager, or ``remove()``, restores the model.

    Raises
    ------
    UnsupportedModelError, ConfigError, StorageError
        When the model cannot be served; a policy, budget or store does not fit it; a tier cannot be opened.
    """
    inner = compat.unwrap(model)
    with ExitStack() as opened:
        own = open_prefix_store(store)
        if own is not None:
            store = opened.enter_context(own)
        budgets = Budgets(keep=keep, read=read, device=None if device is None else parse_bytes(device))
        layout = layout_of(inner)
        bound, rest, budgets = _split(policy, layout, budgets)
        memory = open_memory(layout, layer_devices(inner), rest, budgets, store, tenant=tenant)
        opened.callback(memory.close)
        prefix = PrefixCache(inner, memory, store, tenant) if isinstance(store, Store) else None
        handle = attach(model, memory, prefix, closing=own, bound=bound)
        if explain:
            handle.watch()
        opened.pop_all()
    return handle


def _split(policy: str | Policy, layout: KVLayout, budgets: Budgets) -> tuple[BoundFilter | None, Policy, Budgets]:
    """The prompt filter of a policy, if it has one, and what a session is to run."""
    from kvtier.core.compose import policy as read_policy
    from kvtier.core.filtering import take_filter

    return take_filter(read_policy(policy), layout, budgets)


def attach(
    model: Any,
    memory: Memory,
    prefix: PrefixCache | None = None,
    *,
    closing: Store | None = None,
    bound: BoundFilter | None = None,
) -> PatchHandle:
    """Put a memory under a model; what ``patch`` does once it has one.

    The handle closes the memory, and the store ``closing`` after it. A prompt filter ``bound`` to the model needs a
    memory of the core.

    Raises
    ------
    SessionStateError
        When the model is patched already.
    """
    compat.check_version()
    compat.register(attention, mask)
    return PatchHandle(model, memory, prefix, closing=closing, bound=bound)


class PatchHandle:
    """A patched model: makes its caches, reports, and restores it.

    Several threads may generate with one patched model, each with a cache of its own.

    Attributes
    ----------
    model : PreTrainedModel
        The transformers model that was patched, without an adapter around it.
    memory : Memory
        Where its keys and values live.
    store : Store, optional
        Where its prefixes are found and published.
    """

    def __init__(
        self,
        model: Any,
        memory: Memory,
        prefix: PrefixCache | None = None,
        *,
        closing: Store | None = None,
        bound: BoundFilter | None = None,
    ) -> None:
        self.model: PreTrainedModel = compat.unwrap(model)
        self.memory = memory
        self.store = None if prefix is None else prefix.store
        self._pool = CachePool(memory)
        filtering = None if bound is None else PromptFilter(self.model, self._pool, bound)
        self._pool.filter_name = "" if bound is None else bound.policy.name
        self._calls = PatchedCalls(self.model, self._pool, prefix, filtering)
        self._removed = False
        with ExitStack() as undo:
            if closing is not None:
                undo.callback(closing.close)
            self._install(undo, outer=model)
            self._undo = undo.pop_all()

    def new_cache(self) -> KVTierCache:
        """An empty cache, for several turns over one context: pass it as ``past_key_values``.

        Raises
        ------
        SessionStateError
            After ``remove``.
        """
        if self._removed:
            raise SessionStateError("this handle is removed; patch the model again")
        return self._pool.new_cache()

    def report(self) -> Report:
        """Counts and bytes of the last generation or forward.

        Raises
        ------
        SessionStateError
            Before the first one.
        """
        return self._pool.report()

    def watch(self) -> None:
        """From now on, log what ``explain`` tells; what ``patch(..., explain=True)`` does."""
        self._pool.explaining = True
        cast("CoreMemory", self.memory).logs_reads = True

    def explain(self, row: int = 0) -> Explanation:
        """Which tokens of the last generation were run, and what each layer held and read of them.

        Parameters
        ----------
        row : int
            Of the batch.

        Raises
        ------
        SessionStateError
            Without ``patch(..., explain=True)``, before the first generation, and when tokens came as embeddings.
        InputError
            For a row that there is not.
        """
        rows = self._pool.explain()
        if not rows:
            raise SessionStateError("there is nothing to explain before the first generate() or forward")
        if not 0 <= row < len(rows):
            raise InputError(f"row must be 0 to {len(rows) - 1}, got {row}")
        return rows[row]

    def recover(self, cache: KVTierCache | None = None) -> KVTierCache:
        """Rebuild a cache by running the model over what it was fed, after ``PagesLostError``.

        Parameters
        ----------
        cache : KVTierCache, optional
            The one to rebuild; the one that failed, if only one did.

        Returns
        -------
        cache : KVTierCache
            The same object, as it was before the forward that failed. ``cache.input_ids`` are all tokens fed to it,
            those of that forward too: ``model.generate(cache.input_ids, past_key_values=cache)`` goes on.

        Raises
        ------
        SessionStateError
            When it is not known which cache, or with which tokens.
        """
        cache = self._pool.take_broken() if cache is None else cache
        state = self._calls.check_cache(cache).state
        state.check_alive()
        if state.history.ids is None:
            raise SessionStateError(
                "this cache was fed embeddings, so its tokens are not known; start over with a new cache"
            )
        self._calls.rebuild(cache)
        return cache

    def save(self, path: Path | str, cache: KVTierCache) -> int:
        """Write a cache to a file, as its policy left it, with the tokens it was fed; bytes of the file.

        Raises
        ------
        SessionStateError
            After a forward that failed, and for a cache whose prompt was filtered.
        PagesLostError
            When a page in a lower tier is damaged; no file is left.
        StorageError
            When the file cannot be written; no file is left, and an old one stays.
        """
        return save_cache(self._calls.check_cache(cache), path, fingerprint(self.model))

    def restore(self, path: Path | str) -> KVTierCache:
        """A cache that ``save`` wrote, in this process or another, of the same model under the same policy.

        ``cache.input_ids`` are the tokens it was fed: pass them and those that follow, with ``past_key_values=cache``.

        Raises
        ------
        SessionStateError
            After ``remove``.
        RecordFormatError
            The file is no saved cache, is damaged or cut short, or of a newer version.
        ConfigError
            It was saved by another model, or under another policy or budget of tokens.
        StorageError, CapacityError
            It cannot be read; no tier has room.
        """
        if self._removed:
            raise SessionStateError("this handle is removed; patch the model again")
        return restore_cache(self._pool, path, fingerprint(self.model))

    def remove(self) -> None:
        """Restore the model as it was and free everything; a second call does nothing."""
        if self._removed:
            return
        self._removed = True
        self._undo.close()

    def __enter__(self) -> Self:
        if self._removed:
            raise SessionStateError("this handle is removed; patch the model again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _install(self, undo: ExitStack, outer: nn.Module) -> None:
        """Change the model step by step; ``undo`` takes each step back, last first."""
        modules = compat.attention_modules(self.model)
        configs = compat.attention_configs(self.model)
        if any(compat.implementation(config) == compat.ATTENTION_NAME for config in configs):
            raise SessionStateError(
                "this model is patched already, or shares its config with one that is; remove that handle first"
            )
        undo.callback(self.memory.close)
        undo.callback(self._pool.close_all)
        undo.callback(release, modules)
        adopt(modules, self.memory.layout.layers)
        for config in configs:
            undo.callback(compat.set_implementation, config, compat.implementation(config))
            compat.set_implementation(config, compat.ATTENTION_NAME)
        for module in {id(module): module for module in (self.model, outer)}.values():
            undo.callback(module.register_forward_pre_hook(self._forward_hook(module), with_kwargs=True).remove)
        if callable(getattr(self.model, "generate", None)):
            self._replace_generate(undo)

    def _forward_hook(self, owner: nn.Module) -> Callable[..., Any]:
        # A closure, not a bound method: whoever copies the model must not copy handle and memory with it.
        def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not owner:
                return None
            return (), self._calls.forward(module, arguments_by_name(module.forward, args, kwargs))

        return prepare

    def _replace_generate(self, undo: ExitStack) -> None:
        model: Any = self.model
        attributes = model.__dict__
        before = attributes.get("generate")
        original = model.generate if before is None else before

        @wraps(original)
        def generate(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if owner is not model:
                return type(owner).generate(owner, *args, **kwargs)
            return self._calls.generate(original, arguments_by_name(original, args, kwargs))

        if before is None:
            undo.callback(attributes.pop, "generate")
        else:
            undo.callback(attributes.__setitem__, "generate", before)
        attributes["generate"] = MethodType(generate, model)
