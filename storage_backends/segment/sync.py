"""Group commit: threads that wait for the same file to be synced share one fdatasync."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["GroupSync"]


class GroupSync:
    """Runs a sync for everybody who asked before it began.

    Parameters
    ----------
    sync : callable
        Makes everything written so far durable; OSError when the medium failed.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._changed = threading.Condition()
        self._begun = 0
        self._ended = 0
        self._running = False
        self._failed = 0  # the last sync that failed
        self._error = OSError()

    def wait(self) -> None:
        """Return when a sync that began after this call has ended.

        Raises
        ------
        OSError
            That sync failed: what was written before it may or may not be on the medium.
        """
        with self._changed:
            mine = self._begun + 1
            self._changed.wait_for(lambda: not self._running or self._ended >= mine)
            if self._ended < mine:
                self._begun += 1
                self._running = True
            elif mine <= self._failed:  # or one after it; a doubt about a medium is enough
                raise OSError(self._error.errno, self._error.strerror) from self._error
            else:
                return
        failure: OSError | None = None
        try:
            self._sync()
        except OSError as error:
            failure = error
        with self._changed:
            self._running = False
            self._ended = self._begun
            if failure is not None:
                self._failed, self._error = self._ended, failure
            self._changed.notify_all()
        if failure is not None:
            raise failure
