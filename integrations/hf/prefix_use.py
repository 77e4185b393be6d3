"""What stored prefixes did for one cache: the clock and the counts of its last ``generate``, and its trail."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtier.core.report import PrefixReport

if TYPE_CHECKING:
    from kvtier.core.load_worth import LoadDecision
    from kvtier.integrations.hf.trail import Trail

__all__ = ["PrefixUse", "Restored"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What one look into the store brought.

    Parameters
    ----------
    columns : int
        Columns that the session holds now.
    stored_chunks : tuple of int
        Leading chunks of each row that the store has.
    tokens_matched, tokens_saved : int
        Tokens found, and put back, over the rows of the prompt; copies for beams are not counted.
    """

    columns: int = 0
    stored_chunks: tuple[int, ...] = ()
    tokens_matched: int = 0
    tokens_saved: int = 0
    load_seconds: float = 0.0
    decision: LoadDecision | None = None


class PrefixUse:
    """One cache's dealings with the store.

    Attributes
    ----------
    trail : Trail, optional
        What it publishes; None when nothing ever is.
    reason : str
        Why it does not look up or publish anything; empty when it does.
    restored : Restored
        What the last ``generate`` took from the store.
    """

    def __init__(self, trail: Trail | None = None, reason: str = "") -> None:
        self.trail = trail
        self.reason = reason
        self.restored = Restored()
        self._started: float | None = None
        self._restore_seconds = 0.0
        self._tokens = 0
        self._prompt_end = 0
        self._first_token_s: float | None = None

    def begin(self, started: float, *, tokens: int, prompt_end: int) -> None:
        """A ``generate`` began at ``started`` with ``tokens`` new tokens, up to column ``prompt_end``; work starts."""
        self._started, self._tokens, self._prompt_end = started, tokens, prompt_end
        self._restore_seconds = time.perf_counter() - started
        self._first_token_s = None
        self.resume_publishing()

    def resume_publishing(self) -> None:
        """From now until ``end`` what the cache is fed is known to be of the model that its trail names."""
        if self.trail is not None:
            self.trail.running = True

    def past(self, length: int) -> None:
        """All that concerns the first ``length`` columns is done; behind the prompt, the first token is there."""
        if length >= self._prompt_end and self._first_token_s is None and self._started is not None:
            self._first_token_s = time.perf_counter() - self._started

    def end(self) -> None:
        """The ``generate`` is over, whether it came through or not."""
        self._started = None
        if self.trail is not None:
            self.trail.running = False

    @property
    def measured(self) -> tuple[int, float] | None:
        """Tokens that the last prompt had computed and the seconds they took; None before its first token."""
        if self._first_token_s is None:
            return None
        return self._tokens - self.restored.tokens_saved, self._first_token_s - self._restore_seconds

    def fork(self) -> PrefixUse:
        """The use of a cache that grows apart."""
        twin = PrefixUse(None if self.trail is None else self.trail.fork(), self.reason)
        twin.restored, twin._tokens = self.restored, self._tokens
        return twin

    def report(self) -> PrefixReport:
        """The counts so far; those of published chunks go on while the store works."""
        report = PrefixReport(
            tokens_prompt=self._tokens,
            tokens_matched=self.restored.tokens_matched,
            tokens_saved=self.restored.tokens_saved,
            load_seconds=self.restored.load_seconds,
            restore_seconds=self._restore_seconds,
            first_token_s=self._first_token_s,
            decision=self.restored.decision,
            reason=self.reason,
        )
        trail = self.trail
        if trail is None:
            return report
        return replace(
            report,
            chunks_published=trail.published,
            chunks_refused=trail.refused + trail.backlog,
            chunks_waiting=trail.waiting,
            reason=report.reason or trail.stopped,
        )
