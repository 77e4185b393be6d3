"""Quest: read the pages whose key bounds admit the largest logits (Tang et al. 2024, arXiv 2406.10774, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.policy import Boxes, RetrievalPolicy, Sketch
from kvtier.errors import PolicyError
from kvtier.kernels.page_scores import box_scores
from kvtier.kernels.page_summaries import page_bounds
from kvtier.types import GroupReduce

__all__ = ["Quest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(RetrievalPolicy):
    """Rank pages by an upper bound of q.k from the channel-wise minimum and maximum of their keys.

    The published code ranks per query head, so that a page may be read G times; here a page is read once per KV head.

    Parameters
    ----------
    read : int, optional
        Tokens read per step and KV head, the raw tail included; None takes the session's ``read``.
    dense_layers : int
        First layers that read everything (2 in the paper: their attention is not sparse).
    group_reduce : "mean" | "max" | "sum"
        How the G query heads of one KV head agree on a page; "max" keeps the score an upper bound for every head.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest, Tang et al. 2024, arXiv 2406.10774, section 3.3"

    read: int | None = None
    dense_layers: int = 2
    group_reduce: GroupReduce = "max"

    def __post_init__(self) -> None:
        if self.read is not None and (type(self.read) is not int or self.read < 1):
            raise PolicyError(f"quest: read must be an integer of at least 1 token, got {self.read!r}")
        if type(self.dense_layers) is not int or self.dense_layers < 0:
            raise PolicyError(f"quest: dense_layers must be an integer of at least 0, got {self.dense_layers!r}")
        if self.group_reduce not in ("mean", "max", "sum"):
            raise PolicyError(f"quest: group_reduce must be 'mean', 'max' or 'sum', got {self.group_reduce!r}")

    @property
    def upper_bound(self) -> bool:
        """Of every query head when a group takes its largest score."""
        return self.group_reduce == "max"

    def sketch(self, keys: torch.Tensor) -> Sketch:
        """Channel-wise bounds [Hk, N, Dk] of the keys [Hk, N, P, Dk] of each page."""
        low, high = page_bounds(keys)
        return {"low": low, "high": high}

    def sketch_bytes(self, key_dim: int, element_bytes: int) -> int:
        """A minimum and a maximum per channel."""
        return 2 * key_dim * element_bytes

    def boxes(self, sketch: Sketch) -> Boxes | None:
        """The sketch itself; a subclass with a choice of its own is asked for it."""
        kind = type(self)
        if kind.rank is not Quest.rank or kind.choose is not RetrievalPolicy.choose:
            return None
        return Boxes(sketch["low"], sketch["high"], self.group_reduce)

    def rank(self, query: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        """Upper bounds [B, Hk, N] of the logits in each page for queries [B, Hq, Tq, Dk]."""
        return box_scores(query, sketch["low"], sketch["high"], self.group_reduce)
