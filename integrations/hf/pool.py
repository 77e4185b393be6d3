"""The caches of one patched model: made here, closed here when nobody holds them any more."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from dataclasses import replace
from typing import cast

from kvtier.core.report import SessionReport
from kvtier.errors import KVTierError, SessionStateError
from kvtier.integrations.hf.cache import KVTierCache
from kvtier.integrations.hf.explanation import Explanation, explain_rows
from kvtier.integrations.hf.sessions import Memory, Report
from kvtier.integrations.hf.state import CacheState

__all__ = ["CachePool"]


class CachePool:
    """Makes caches over one memory and remembers the last report.

    Attributes
    ----------
    filter_name : str
        The prompt filter that acts before the sessions' policy; empty when there is none.
    explaining : bool
        Whether what a closed cache held is remembered for ``explain``.

    Notes
    -----
    Threads share a pool; every method may be called from any of them. The garbage collector, which may run inside
    any call that holds the memory's lock, only puts a dropped state on a queue; ``sweep`` closes it later.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._caches: weakref.WeakSet[KVTierCache] = weakref.WeakSet()
        self._dropped: deque[CacheState] = deque()
        self._latest: CacheState | None = None
        self.filter_name = ""
        self.explaining = False
        self._explained: tuple[Explanation, ...] | KVTierError = ()
        self._report: tuple[Report, CacheState] | None = None
        self._lost: KVTierCache | None = None

    def new_cache(self) -> KVTierCache:
        """An empty cache."""
        self.sweep()
        return self.wrap(CacheState(self.memory))

    def wrap(self, state: CacheState) -> KVTierCache:
        """A cache around a state; when it is dropped the state is closed."""
        cache = KVTierCache(state, self)
        self._caches.add(cache)
        weakref.finalize(cache, self._dropped.append, state).atexit = False
        return cache

    def use(self, cache: KVTierCache) -> None:
        """Take this cache for the one that ``report`` speaks of."""
        self._latest = cache.state

    def close(self, state: CacheState) -> None:
        """Free a state's session, keeping its report if it was the last in use."""
        if state.closed:
            return
        if state is self._latest:
            # A session that failed cannot tell; whoever closes it is told of the failure already.
            with contextlib.suppress(SessionStateError):
                self._report = (state.session.report(), state)
            if self.explaining:
                self._explained = self._explain_or_say(state)
        state.close()

    def sweep(self) -> None:
        """Close what was dropped."""
        while self._dropped:
            self.close(self._dropped.popleft())

    def report(self) -> Report:
        """The report of the cache in use, or of the last one that was.

        Raises
        ------
        SessionStateError
            Before anything ran.
        """
        self.sweep()
        latest = self._latest
        if latest is not None and not latest.closed:
            return self._full(latest.session.report(), latest)
        if self._report is None:
            raise SessionStateError("there is nothing to report before the first generate() or forward")
        return self._full(*self._report)

    def explain(self) -> tuple[Explanation, ...]:
        """Every row of the cache in use, or of the last one that was; empty before anything ran.

        Raises
        ------
        SessionStateError
            When nobody asked for it, or tokens are not known.
        """
        if not self.explaining:
            raise SessionStateError("what policies do is not watched; ask for it with patch(..., explain=True)")
        self.sweep()
        latest = self._latest
        if latest is not None and not latest.closed:
            return self._explain(latest)
        if isinstance(self._explained, KVTierError):
            raise self._explained
        return self._explained

    def _explain_or_say(self, state: CacheState) -> tuple[Explanation, ...] | KVTierError:
        try:
            return self._explain(state)
        except KVTierError as error:
            return error

    def _explain(self, state: CacheState) -> tuple[Explanation, ...]:
        policy = cast("SessionReport", self._full(state.session.report(), state)).policy
        return explain_rows(state, policy)

    def keep_lost(self, cache: KVTierCache) -> None:
        """Hold on to a cache whose pages are gone, for ``take_broken``."""
        self._lost = cache

    def take_broken(self) -> KVTierCache:
        """The one cache whose last forward failed.

        Raises
        ------
        SessionStateError
            When there is none, or more than one.
        """
        lost, self._lost = self._lost, None
        broken = [cache for cache in list(self._caches) if cache.state.unfinished and not cache.state.closed]
        if lost is not None:
            return lost
        if len(broken) != 1:
            raise SessionStateError(f"{len(broken)} caches failed; name the one to recover: handle.recover(cache)")
        return broken[0]

    def close_all(self) -> None:
        """Close every cache that is still alive."""
        self._lost = None
        self.sweep()
        for cache in list(self._caches):
            self.close(cache.state)

    def _full(self, report: Report, state: CacheState) -> Report:
        """A report with what store and prompt filter did; chunks may be published after the session was closed."""
        if not isinstance(report, SessionReport):
            return report
        if state.prefix is not None:
            report = replace(report, prefix=state.prefix.report())
        if not self.filter_name:
            return report
        prompt = None if state.filtered is None else state.filtered.report()
        return replace(report, policy=f"{self.filter_name} | {report.policy}", lossless=False, prompt=prompt)
