"""What attention may have beyond scale, softcap and positions: bias, ragged lengths, a tree, a fixed maximum."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from kvtier.errors import InputError
from kvtier.types import Tree

__all__ = ["MOST_DRAFTS", "PLAIN", "UNIFIED_TOTALS", "Extras", "check_extras", "drafts_hidden"]

MOST_DRAFTS: Final = 64
"""Drafted tokens of a tree: the bits of an int64."""

UNIFIED_TOTALS: Final = (2.0**-64, 2.0**64)
"""Between these a sum of ``exp(logit - unified_max)`` is as exact as any: what vanishes is below its rounding."""


class Extras(NamedTuple):
    """Options that most calls do without; ``PLAIN`` has none of them.

    ``bias`` [B, Hk or Hq, N] is added to the logits; ``lengths`` [B, Hk] int64 says how many keys each KV head has;
    ``tree`` hides drafts from queries that do not descend from them; ``unified_max`` stands in for the greatest logit.
    """

    bias: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    tree: Tree | None = None
    unified_max: float | None = None

    @property
    def only_lengths(self) -> bool:
        """Whether there is no option but ragged lengths, or none at all."""
        return self.bias is None and self.tree is None and self.unified_max is None

    def of_row(self, row: slice) -> Extras:
        """The bias of some batch rows alone, where neither lengths nor a tree are left."""
        return self if self.bias is None else self._replace(bias=self.bias[row])


PLAIN: Final = Extras()


def check_extras(extras: Extras, q: torch.Tensor, kv_heads: int, keys: int) -> None:
    """Refuse options whose shapes are not those of q [B, Hq, Tq, Dk] and of ``keys`` keys of each KV head.

    Raises
    ------
    InputError
        With what was required and what was got.
    """
    batch, query_heads, queries, _ = q.shape
    bias, lengths, tree = extras.bias, extras.lengths, extras.tree
    if bias is not None and bias.shape not in {(batch, kv_heads, keys), (batch, query_heads, keys)}:
        raise InputError(
            f"bias must be [{batch}, {kv_heads} or {query_heads}, {keys}]: one number per KV or query head and key, "
            f"got {list(bias.shape)}"
        )
    if lengths is not None and (lengths.shape != (batch, kv_heads) or lengths.dtype != torch.int64):
        raise InputError(
            f"lengths must be int64 [{batch}, {kv_heads}]: the keys of each KV head, got {lengths.dtype} "
            f"{list(lengths.shape)}"
        )
    if tree is not None and (
        tree.ancestors.shape != (batch, queries)
        or tree.ancestors.dtype != torch.int64
        or not max(0, keys - MOST_DRAFTS) <= tree.first <= keys
    ):
        raise InputError(
            f"a tree needs ancestors int64 [{batch}, {queries}] and at most {MOST_DRAFTS} drafts, which are the last "
            f"of {keys} keys, got {tree.ancestors.dtype} {list(tree.ancestors.shape)} and drafts from {tree.first} on"
        )


def drafts_hidden(ancestors: torch.Tensor, drafts: int) -> torch.Tensor:
    """Bool [B, Tq, drafts], True where a query with these ancestor bits [B, Tq] does not descend from a draft."""
    bits = torch.arange(drafts, device=ancestors.device)
    return ((ancestors.unsqueeze(-1) >> bits) & 1) == 0
