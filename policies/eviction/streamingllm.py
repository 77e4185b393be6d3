"""StreamingLLM: keep the first tokens and the last ones (Xiao et al. 2024, arXiv 2309.17453, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.policy import Phase, SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.types import KVLayout

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(SelectionPolicy):
    """Evict the middle of a prompt: attention sinks at its start and the newest tokens stay.

    It acts at the end of a prompt; the published code also evicts at every decode step and renumbers what it kept.
    Here kept tokens keep the positions that RoPE saw.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head, the sinks included; None takes the session's ``keep``.
    sinks : int
        First tokens that always stay (4 in the paper).
    """

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "StreamingLLM, Xiao et al. 2024, arXiv 2309.17453, section 3.2"
    phase: ClassVar[Phase] = Phase.PREFILL

    keep: int | None = None
    sinks: int = 4

    def __post_init__(self) -> None:
        if type(self.sinks) is not int or self.sinks < 0:
            raise PolicyError(f"streamingllm: sinks must be an integer of at least 0 tokens, got {self.sinks!r}")
        if self.keep is not None and (type(self.keep) is not int or self.keep <= self.sinks):
            raise PolicyError(f"streamingllm: keep must be more than sinks ({self.sinks}) tokens, got {self.keep!r}")

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The sinks [B, Hk, T] bool, by their positions [B, Hk, T], so that a second eviction spares the same ones."""
        return positions < self.sinks

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """The order of the slots [B, Hk, T]: the newer, the higher."""
        return torch.arange(view.positions.shape[-1], device=view.positions.device).float().expand(view.positions.shape)

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """``keep`` tokens in every layer, more than the sinks."""
        if keep <= self.sinks:
            raise PolicyError(f"streamingllm: keep must be more than sinks ({self.sinks}) tokens, got {keep}")
        return (keep,) * len(layout.layers)
