"""Full: everything is kept, tiered and read; attention is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtier.core.policy import Policy

__all__ = ["Full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(Policy):
    """Keep every token and read every page, wherever it lives."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "none: softmax attention as the model defines it"
    lossless: ClassVar[bool] = True
