"""What a published claim is to this benchmark: its number, how ours is measured, and what ours cannot say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.claims.scene import Scene

__all__ = ["Claim", "Finding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was measured.

    Parameters
    ----------
    ours : str
        In one line, to stand beside the published number.
    holds : bool
        Whether the shape of the claim shows.
    rows : sequence of dict
        Plain values ready for JSON; all rows of a claim have the same keys, in the order of the table's columns.
    """

    ours: str
    holds: bool
    rows: Sequence[dict[str, str | int | float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One published claim.

    Parameters
    ----------
    title : str
        The claim as a sentence.
    published, source : str
        Its number, and where it stands.
    layers : int
        Of the constructed model.
    cannot : str
        What our number does not say about the published one.
    measure : callable
        From a scene to a finding.
    """

    title: str
    published: str
    source: str
    layers: int
    cannot: str
    measure: Callable[[Scene], Finding]
