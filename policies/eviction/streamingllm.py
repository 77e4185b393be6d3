"""StreamingLLM: the first tokens and the newest (Xiao et al. 2023, arXiv 2309.17453, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvtier.core.policy import Phase, PositionMode, SelectionPolicy, StepRule
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.policies.eviction.budgets import at_least, whole
from kvtier.types import KVLayout

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(SelectionPolicy):
    """Keep attention sinks at the start and a window at the end, at every step; whatever lies between is lost.

    With ``positions="compact"`` kept tokens are numbered without gaps, as in the paper, so that no distance is ever
    longer than ``keep`` and the tokens of one step, however long the text. The published code stores keys before RoPE
    and rotates all of them at every step; here keys stay as the model made them, and the query is turned to meet the
    sinks: by as many positions as were dropped between them and the window.

    Parameters
    ----------
    keep : int, optional
        Tokens kept per KV head, sinks included; None takes the session's ``keep``.
    sinks : int
        Tokens at the start that are never dropped.
    positions : "original" | "compact"
        Whether kept tokens keep the positions that RoPE saw. Compact ones need frequencies that are known and do not
        depend on the length of the text.
    """

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "StreamingLLM, Xiao et al. 2023, arXiv 2309.17453, section 3.2"
    phase: ClassVar[Phase] = Phase.DECODE

    keep: int | None = None
    sinks: int = 4
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        whole(self.name, "sinks", self.sinks, 0)
        if self.positions not in ("original", "compact"):
            raise PolicyError(f"streamingllm: positions must be 'original' or 'compact', got {self.positions!r}")
        if self.keep is not None:
            whole(self.name, "keep", self.keep, 1)
            at_least(self.name, self.keep, self.sinks, "sinks")

    @property
    def position_mode(self) -> PositionMode:
        """As ``positions`` says."""
        return PositionMode(self.positions)

    @property
    def step_rule(self) -> StepRule:
        """The first token behind the sinks leaves."""
        return StepRule(by=None, sinks=self.sinks)

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """The sinks [B, Hk, T] bool, by their positions [B, Hk, T]."""
        return positions < self.sinks

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """Newer is better [B, Hk, T]."""
        del stats
        newest = torch.arange(view.positions.shape[-1], dtype=torch.float32, device=view.positions.device)
        return newest.expand(view.positions.shape)

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """``keep`` tokens in every layer, more than the sinks."""
        at_least(self.name, keep, self.sinks, "sinks")
        return (keep,) * len(layout.layers)
