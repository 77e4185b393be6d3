"""Sharing out a budget of tokens: integers, exact, each share at least a floor (largest remainder)."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.errors import PolicyError

__all__ = ["at_least", "share_out", "whole"]


def share_out(weights: Sequence[float], total: int, least: int) -> tuple[int, ...]:
    """Shares that sum to ``total``, each at least ``least``, the rest in proportion to ``weights``.

    What is left after rounding down goes to the largest remainders; of equal ones to the earlier.

    Raises
    ------
    PolicyError
        When ``total`` is less than ``least`` for each.
    """
    rest = total - least * len(weights)
    if rest < 0:
        raise PolicyError(f"{total} tokens cannot give {len(weights)} layers at least {least} each; raise keep")
    sum_of_weights = sum(weights)
    parts = [weight / sum_of_weights for weight in weights] if sum_of_weights > 0 else [1 / len(weights)] * len(weights)
    ideal = [rest * part for part in parts]
    shares = [int(share) for share in ideal]
    order = sorted(range(len(shares)), key=lambda index: (shares[index] - ideal[index], index))
    for index in order[: rest - sum(shares)]:
        shares[index] += 1
    return tuple(least + share for share in shares)


def whole(policy: str, name: str, value: object, least: int) -> None:
    """Refuse a hyper-parameter that is no integer of at least ``least``.

    Raises
    ------
    PolicyError
    """
    if type(value) is not int or value < least:
        raise PolicyError(f"{policy}: {name} must be an integer of at least {least}, got {value!r}")


def at_least(policy: str, keep: int, protected: int, what: str) -> None:
    """Refuse a budget that is used up by what is always kept.

    Raises
    ------
    PolicyError
    """
    if keep <= protected:
        raise PolicyError(f"{policy}: keep must be more than {what} ({protected}) tokens, got {keep}")
