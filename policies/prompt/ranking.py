"""The order in which a prompt's tokens are run, best first: its end, its beginning, then what the votes say."""

from __future__ import annotations

import torch

from kvtier.errors import PolicyError

__all__ = ["best_tokens", "check_edges", "edges"]


def check_edges(name: str, keep: int | None, prefix: int, suffix: int) -> None:
    """Refuse sizes that cannot mean anything.

    Raises
    ------
    PolicyError
    """
    for word, value in (("prefix", prefix), ("suffix", suffix)):
        if type(value) is not int or value < 0:
            raise PolicyError(f"{name}: {word} must be an integer of at least 0 tokens, got {value!r}")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise PolicyError(f"{name}: keep must be an integer of at least 1 token, got {keep!r}")


def edges(tokens: int, prefix: int, suffix: int) -> torch.Tensor:
    """The first ``prefix`` and the last ``suffix`` of ``tokens`` [T] bool."""
    place = torch.arange(tokens)
    return (place < prefix) | (place >= tokens - suffix)


def best_tokens(
    votes: torch.Tensor, keep: int, *, prefix: int, suffix: int, certain: torch.Tensor | None = None
) -> torch.Tensor:
    """The ``keep`` best of T tokens, ascending: the end, newest first; the beginning; ``certain`` ones; the best votes.

    Of equal votes the earlier token wins. A larger ``keep`` takes all that a smaller one takes.

    Parameters
    ----------
    votes : Tensor
        [T].
    certain : Tensor, optional
        [T] bool.
    """
    total = votes.shape[0]
    place = torch.arange(total, device=votes.device)
    turn = votes.sort(descending=True, stable=True).indices
    rank = torch.empty_like(turn)
    rank[turn] = place
    rank += 2 * total
    if certain is not None:
        rank = torch.where(certain, rank - total, rank)
    rank = torch.where(place < prefix, place, rank)
    rank = torch.where(place >= total - suffix, -place - 1, rank)
    return rank.sort(stable=True).indices[:keep].sort().values
