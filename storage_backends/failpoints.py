"""Named places in the storage code where a test may stop the world: kill the process, raise, wait."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["NAMES", "active", "reach"]

NAMES: set[str] = set()
"""Every failpoint of the modules imported so far; each module adds its own."""

active: dict[str, Callable[[], None]] = {}
"""What happens at a failpoint; empty but in tests."""


def reach(name: str) -> None:
    """Say that execution came to a failpoint."""
    if active and (action := active.get(name)) is not None:
        action()
