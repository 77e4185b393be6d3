"""When the tokens came: a streamer for ``generate`` that takes the time of each, and passes it on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Stopwatch"]


class Streamer(Protocol):
    """What ``generate`` calls: once with the prompt, once a token, once at the end."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(slots=True)
class Stopwatch:
    """The moments of a generation of one sequence.

    Parameters
    ----------
    listener : Streamer, optional
        Hears everything too: the one that prints text as it comes.
    on_token : callable, optional
        Called after each new token: the tick of a progress bar.
    """

    listener: Streamer | None = None
    on_token: Callable[[], object] | None = None
    _moments: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        """Take the time; the first call brings the prompt."""
        self._moments.append(time.perf_counter())
        if self.listener is not None:
            self.listener.put(value)
        if self.on_token is not None and len(self._moments) > 1:
            self.on_token()

    def end(self) -> None:
        """Pass the end on."""
        if self.listener is not None:
            self.listener.end()

    @property
    def prefill_s(self) -> float:
        """Seconds from the prompt to the first token; zero when none came."""
        return self._moments[1] - self._moments[0] if len(self._moments) > 1 else 0.0

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last."""
        return self._moments[-1] - self._moments[1] if len(self._moments) > 2 else 0.0

    @property
    def decode_steps(self) -> int:
        """Tokens after the first, each the work of one decode step."""
        return max(0, len(self._moments) - 2)

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode steps a second; zero when there was none."""
        return self.decode_steps / self.decode_s if self.decode_s > 0 else 0.0
