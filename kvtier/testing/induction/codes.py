"""Sparse codes: each word is a few hot dimensions, needle words in dimensions of their own. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from kvtier.errors import ConfigError
from kvtier.testing.induction.spec import InductionSpec

__all__ = ["assign_codes"]


def assign_codes(spec: InductionSpec, needle_flags: Sequence[bool]) -> list[tuple[int, ...]]:
    """The ``spec.hot`` dimensions of each word's code, in ``range(spec.code_dims)``; no two words share all of them.

    The box bound of a page counts the query's hot dimensions that any of its keys has. The keys of a page of ordinary
    words cover many document dimensions between them, but not one needle dimension: needle words have their own.

    Parameters
    ----------
    needle_flags : sequence of bool
        For each word, whether only needles use it.

    Raises
    ------
    ConfigError
        When there are more words than codes.
    """
    rng = random.Random(spec.seed)
    channels = {
        False: _shuffled_codes(range(spec.document_dims), spec.hot, rng),
        True: _shuffled_codes(range(spec.document_dims, spec.code_dims), spec.hot, rng),
    }
    for flag, codes in channels.items():
        words = sum(flag == other for other in needle_flags)
        if words > len(codes):
            raise ConfigError(
                f"{words} {'needle' if flag else 'document'} words need as many codes, {spec.hot} hot dimensions give "
                f"{len(codes)}; lower max_words, or change needle_dims or head_dim"
            )
    streams = {flag: iter(codes) for flag, codes in channels.items()}
    return [next(streams[flag]) for flag in needle_flags]


def _shuffled_codes(dims: range, hot: int, rng: random.Random) -> list[tuple[int, ...]]:
    """All choices of ``hot`` dimensions, in an order that only depends on ``rng.random()``, which no Python changes."""
    return sorted(combinations(dims, hot), key=lambda _: rng.random())
