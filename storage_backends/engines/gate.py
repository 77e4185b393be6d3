"""A count of the calls under way, so that close can wait for them."""

from __future__ import annotations

import threading

from kvtier.errors import StorageError

__all__ = ["Gate"]


class Gate:
    """Lets calls in until it is shut: a descriptor closed under a transfer may already be another file's.

    Parameters
    ----------
    name : str
        What is closed, for the message: ``"the spill file"``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    def __enter__(self) -> None:
        with self._changed:
            if self._shut:
                raise StorageError(f"{self._name} is closed; open a new one")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def shut(self) -> bool:
        """Let nobody in any more and wait until all are out; False when it was shut before."""
        with self._changed:
            first = not self._shut
            self._shut = True
            self._changed.wait_for(lambda: not self._inside)
            return first
