"""Is a stored prefix worth loading? Predicted transfer against predicted prefill, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.errors import InputError
from kvtier.storage_backends.rates import TransferRate

__all__ = ["LoadDecision", "RecomputeRate", "StoredPrefix", "decide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeRate:
    """How long a model takes to prefill.

    Parameters
    ----------
    tokens_per_second : float
        Of the part that does not depend on the context: projections and MLPs.
    attention_pairs_per_second : float, optional
        Query-key pairs; None leaves attention out.
    """

    tokens_per_second: float
    attention_pairs_per_second: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_per_second", "attention_pairs_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be more than 0, got {value}")

    def seconds(self, tokens: int) -> float:
        """Seconds to prefill the first ``tokens`` of a prompt."""
        pairs = tokens * (tokens + 1) / 2
        attention = 0.0 if self.attention_pairs_per_second is None else pairs / self.attention_pairs_per_second
        return tokens / self.tokens_per_second + attention


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDecision:
    """How much of a stored prefix to load, and why.

    Parameters
    ----------
    tokens : int
        Tokens to load; the rest is faster to compute again.
    stored_tokens : int
        Tokens that are stored.
    transfer_seconds, recompute_seconds : float
        Predicted for ``tokens``; for ``stored_tokens`` when nothing is worth loading.
    """

    tokens: int
    stored_tokens: int
    transfer_seconds: float
    recompute_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrefix:
    """Where the chunks of a stored prefix lie: the tier of each, and what all of them have in common."""

    tiers: Sequence[int]
    chunk_bytes: int
    chunk_tokens: int


def decide(
    prefix: StoredPrefix, recompute: RecomputeRate, rates: Sequence[TransferRate], decoding: TransferRate
) -> LoadDecision:
    """The leading chunks whose loading saves the most time.

    Parameters
    ----------
    rates : sequence of TransferRate
        Of each tier.
    decoding : TransferRate
        From a payload to tensors.
    """
    chunk_bytes, chunk_tokens = prefix.chunk_bytes, prefix.chunk_tokens
    nbytes = [0] * len(rates)
    best = (0.0, 0, 0.0, 0.0)
    transfer = spent = 0.0
    for count, tier in enumerate(prefix.tiers, start=1):
        transfer -= rates[tier].predict(nbytes[tier])
        nbytes[tier] += chunk_bytes
        transfer += rates[tier].predict(nbytes[tier]) + decoding.predict(chunk_bytes)
        spent = recompute.seconds(count * chunk_tokens)
        best = max(best, (spent - transfer, count, transfer, spent))
    _, count, *predicted = best if best[1] else (0.0, 0, transfer, spent)
    return LoadDecision(
        tokens=count * chunk_tokens,
        stored_tokens=len(prefix.tiers) * chunk_tokens,
        transfer_seconds=predicted[0],
        recompute_seconds=predicted[1],
    )
