"""How long a transfer takes: latency and bandwidth, learnt from the transfers that happen."""

from __future__ import annotations

import threading

__all__ = ["TransferRate"]

_WEIGHT = 0.2  # of the newest transfer


class TransferRate:
    """A running estimate of ``latency + bytes / bandwidth``.

    A transfer that is mostly latency teaches the latency, any other the bandwidth; each new one counts for a fifth.

    Parameters
    ----------
    latency : float
        Seconds, to start from.
    bandwidth : float
        Bytes per second, to start from.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, *, latency: float, bandwidth: float) -> None:
        self._lock = threading.Lock()
        self._latency = latency
        self._byte_seconds = 1 / bandwidth
        self._transfers = 0

    @property
    def latency(self) -> float:
        """Seconds before the first byte."""
        return self._latency

    @property
    def bandwidth(self) -> float:
        """Bytes per second after it."""
        return 1 / self._byte_seconds

    @property
    def transfers(self) -> int:
        """How many were learnt from."""
        return self._transfers

    def predict(self, nbytes: int) -> float:
        """Seconds for a transfer of ``nbytes``; 0 for none."""
        return self._latency + nbytes * self._byte_seconds if nbytes else 0.0

    def learn(self, nbytes: int, seconds: float) -> None:
        """Take a transfer that happened into account."""
        if nbytes < 1 or seconds <= 0:
            return
        with self._lock:
            self._transfers += 1
            moving = nbytes * self._byte_seconds
            if moving < self._latency:
                self._latency += _WEIGHT * (max(seconds - moving, seconds / 2) - self._latency)
            else:
                found = max(seconds - self._latency, seconds / 2) / nbytes
                self._byte_seconds += _WEIGHT * (found - self._byte_seconds)
