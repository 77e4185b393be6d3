"""What a session or a memory holds, read and spent, as one frozen value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtier.core.batch import Batch
    from kvtier.core.load_worth import LoadDecision

__all__ = ["PrefixReport", "PromptReport", "SessionReport", "TierReport", "session_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierReport:
    """Bytes of one tier, counted at its allocations.

    Parameters
    ----------
    capacity : int, optional
        The bound; None when there is none.
    used : int
        Bytes that hold live KV, sketches or tails.
    allocated : int
        Bytes held from the system.
    peak : int
        The most that was ever used.
    """

    capacity: int | None
    used: int
    allocated: int
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixReport:
    """What the store saved the last ``generate`` of a cache, and what it was given.

    Parameters
    ----------
    tokens_prompt : int
        Tokens of all rows that were not in the cache before.
    tokens_matched : int
        Those of them that were found in the store.
    tokens_saved : int
        Those that were loaded instead of computed: in a batch all rows go on from one column.
    chunks_published : int
        Chunks of this cache that the store took, or had already, so far.
    chunks_refused : int
        Full chunks of this cache that it did not take.
    chunks_waiting : int
        Chunks that are on their way to it now.
    load_seconds : float
        Time to read and verify what was loaded.
    restore_seconds : float
        Time to match, load and put it into the session.
    first_token_s : float, optional
        From the call of ``generate`` to its first token; None before that.
    decision : LoadDecision, optional
        What loading and computing were predicted to take, once the speed of a prefill was measured.
    reason : str
        Why nothing was looked up, loaded or published; empty when nothing stood in the way.
    """

    tokens_prompt: int = 0
    tokens_matched: int = 0
    tokens_saved: int = 0
    chunks_published: int = 0
    chunks_refused: int = 0
    chunks_waiting: int = 0
    load_seconds: float = 0.0
    restore_seconds: float = 0.0
    first_token_s: float | None = None
    decision: LoadDecision | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What a prompt filter left of the prompt that began a cache, over all rows.

    Parameters
    ----------
    tokens_prompt : int
        Tokens that were given.
    tokens_run : int
        Those of them that were run through the whole model.
    votes_seconds : float
        Time of the first run, which says which.
    """

    tokens_prompt: int
    tokens_run: int
    votes_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionReport:
    """A session and the memory under it.

    Parameters
    ----------
    tokens : int
        Tokens seen per row, padding included.
    kept : int
        Most slots held in any layer of any row.
    pages_read, pages_held : int
        Pages read by decode steps per KV head, and pages there were to read, summed over layers and steps.
    seconds : dict of str to float
        Time in ``append`` and ``attend``.
    moved : dict of str to int
        Bytes written below the device, spilled from host to NVMe, read from below, promoted.
    prefix : PrefixReport, optional
        What stored prefixes did; None without a store.
    prompt : PromptReport, optional
        What a prompt filter did; None without one, and before it acted.
    """

    policy: str
    tenant: str
    lossless: bool
    rows: int
    tokens: int
    kept: int
    bytes: dict[str, TierReport]
    device_bytes: dict[str, int]
    moved: dict[str, int]
    pages_read: int
    pages_held: int
    seconds: dict[str, float]
    prefix: PrefixReport | None = None
    prompt: PromptReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


def session_report(batch: Batch, *, tokens: int, seconds: Mapping[str, float]) -> SessionReport:
    """The report of a session that holds this batch and saw ``tokens`` columns."""
    memory = batch.memory
    held = Counter[str]()
    for ledger in memory.ledgers.values():
        held.update(ledger.by_purpose)
    return SessionReport(
        policy=memory.policy.label,
        tenant=memory.tenant,
        lossless=memory.policy.lossless,
        rows=len(batch.rows),
        tokens=tokens,
        kept=max((sequence.length for sequence in batch.sequences), default=0),
        bytes=memory.tier_reports(),
        device_bytes=dict(held),
        moved=memory.moved(),
        pages_read=batch.pages_read,
        pages_held=batch.pages_held,
        seconds=dict(seconds),
    )
