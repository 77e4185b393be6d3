"""Types of command line options that several benchmarks have."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["contexts", "words"]


def contexts(least: int) -> Callable[[str], tuple[int, ...]]:
    """Numbers of tokens separated by commas, each at least ``least``."""

    def read(text: str) -> tuple[int, ...]:
        found = tuple(int(word) for word in text.split(","))
        if min(found) < least:
            raise argparse.ArgumentTypeError(f"each must be at least {least} tokens, got {min(found)}")
        return found

    return read


def words(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """Some of the ``allowed`` words, separated by commas."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        unknown = [word for word in found if word not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got {', '.join(unknown)}")
        return found

    return read
