"""Reads and writes of every competitor, in turns, in an order drawn anew: what disturbs one disturbs all."""

from __future__ import annotations

import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.peers.process import PeerError
from benchmarks.store import fio
from benchmarks.store.competitors import KVTIER, Competitor, fios, served
from benchmarks.store.settings import Settings, Visit

__all__ = ["measure"]

Rates = dict[str, list[float]]
"""Bytes a second in each round, by competitor."""


def measure(settings: Settings) -> dict[str, Any]:
    """A row for every kind of write and read of every visit."""
    rows: dict[tuple[str, str], Rates] = defaultdict(lambda: defaultdict(list))
    plain: Sequence[Competitor] = () if fio.missing() else fios(settings)
    with ExitStack() as stack:
        failed = _rounds(settings, [*plain, *served(settings, stack)], rows)
    plains = {one.label for one in plain}
    return {
        "failed": failed,
        "rows": [_row(visit, what, rates, plains) for (visit, what), rates in rows.items()],
    }


def _rounds(
    settings: Settings, competitors: Sequence[Competitor], rows: Mapping[tuple[str, str], Rates]
) -> dict[str, str]:
    """All rounds; the competitors that failed, which take no further turns, and why."""
    order, failed = list(competitors), dict[str, str]()
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order, not a secret
    for turn in range(settings.repeats):
        for visit in settings.visits:
            print(f"round {turn + 1} of {settings.repeats}: {_title(visit)}", file=sys.stderr, flush=True)
            shuffle(order)
            for competitor in [one for one in order if one.label not in failed and one.takes(visit, turn)]:
                try:
                    rates = competitor.visit(visit)
                except (PeerError, fio.FioError) as error:
                    failed[competitor.label] = f"{_title(visit)}: {error}"
                    continue
                for what, rate in rates.items():
                    rows[_title(visit) if what == "write" else visit.name, what][competitor.label].append(rate)
    return failed


def _row(name: str, what: str, rates: Rates, plains: set[str]) -> dict[str, Any]:
    """Medians and spreads; the ratios are medians of the ratios within a round."""
    plain = {label: rate for label, rate in rates.items() if label in plains}
    peers = {label: rate for label, rate in rates.items() if label not in plains and label != KVTIER}
    best_plain, best_peer = _best(plain), _best(peers)
    return {
        "name": name,
        "what": what,
        "competitors": {label: _summary(rate) for label, rate in rates.items()},
        "fio_best": best_plain,
        "peer_best": best_peer,
        "vs_fio": _ratio(rates, best_plain),
        "vs_peer": _ratio(rates, best_peer),
    }


def _summary(rates: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "rounds": [round(rate) for rate in rates],
    }


def _best(rates: Mapping[str, Sequence[float]]) -> str | None:
    return max(rates, key=lambda label: statistics.median(rates[label]), default=None)


def _ratio(rates: Rates, best: str | None) -> float | None:
    ours = rates.get(KVTIER)
    if best is None or not ours:
        return None
    return statistics.median(mine / its for mine, its in zip(ours, rates[best], strict=False))


def _title(visit: Visit) -> str:
    return f"{visit.name}, {'durable' if visit.durable else 'relaxed'}"
