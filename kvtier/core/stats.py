"""What a policy may see: slots by position, and the statistics it declared a need for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kvtier.errors import SessionStateError

if TYPE_CHECKING:
    import torch

    from kvtier.types import Rope

__all__ = ["QueryMoments", "SlotView", "Stats"]

_T = TypeVar("_T")


class QueryMoments(NamedTuple):
    """Queries of a prompt before rotation: ``mean`` [B, Hq, Dk] and ``covariance`` [B, Hq, Dk, Dk], fp32.

    ``rope`` rotates them, and ``scale`` is the factor of q.k.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    rope: Rope
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotView:
    """Slots of one layer; their contents only for a policy that declared the need.

    Parameters
    ----------
    positions : Tensor
        Logical positions [B, Hk, T] int64.
    protected : Tensor
        Slots that no policy ranks [B, Hk, T] bool.
    keys : Tensor, optional
        Keys as attention sees them [B, Hk, T, Dk].
    valid : Tensor, optional
        Which slots hold a token [B, Hk, T] bool, where KV heads hold different numbers; the others come first in a
        row. None when all do.
    value_norms : Tensor, optional
        Lengths of the values [B, Hk, T] fp32.
    memory : Tensor, optional
        What the last merge of this sequence said to remember [B, Hk, S] fp32; None before the first.
    """

    positions: torch.Tensor
    protected: torch.Tensor
    keys: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    value_norms: torch.Tensor | None = None
    memory: torch.Tensor | None = None

    def require_keys(self) -> torch.Tensor:
        """``keys``, or ``SessionStateError`` when the policy forgot to declare the need."""
        return _present(self.keys, "KEYS")

    def require_value_norms(self) -> torch.Tensor:
        """``value_norms``, or ``SessionStateError`` when the policy forgot to declare the need."""
        return _present(self.value_norms, "VALUE_NORMS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Statistics of one layer; a field that no policy declared is None and was never computed.

    Parameters
    ----------
    window_attention : Tensor, optional
        Attention of the last queries summed per key, reduced to KV heads [B, Hk, T] fp32.
    column_sums : Tensor, optional
        Attention of all queries summed per key, reduced to KV heads [B, Hk, T] fp32.
    query_moments : QueryMoments, optional
        Mean and covariance of the prompt's queries before rotation.
    """

    window_attention: torch.Tensor | None = None
    column_sums: torch.Tensor | None = None
    query_moments: QueryMoments | None = None

    def require_window_attention(self) -> torch.Tensor:
        """``window_attention``, or ``SessionStateError`` when the policy forgot to declare the need."""
        return _present(self.window_attention, "WINDOW_ATTENTION")

    def require_column_sums(self) -> torch.Tensor:
        """``column_sums``, or ``SessionStateError`` when the policy forgot to declare the need."""
        return _present(self.column_sums, "COLUMN_SUMS")

    def require_query_moments(self) -> QueryMoments:
        """``query_moments``, or ``SessionStateError`` when the policy forgot to declare the need."""
        return _present(self.query_moments, "QUERY_MOMENTS")


def _present(field: _T | None, need: str) -> _T:
    if field is None:
        raise SessionStateError(f"this statistic was not computed; declare Need.{need} in the policy's `needs`")
    return field
