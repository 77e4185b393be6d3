"""Records and chunks out of host memory, every byte verified, beside copying as many bytes and verifying nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import torch

from benchmarks.registry import BenchmarkError
from benchmarks.store.keys import key_of, records_of
from benchmarks.store.settings import Settings
from benchmarks.timing import Competitor, Limits, contest
from kvtier.core.chunks import KVChunk
from kvtier.core.hit import Hit
from kvtier.core.store import Store, open_store
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ReadRequest
from kvtier.types import KVLayout

__all__ = ["measure"]

_PER_CALL: Final = 8
_KVTIER: Final = "kvtier host tier, verified"
_TYPED: Final = "hit.load(into=chunks), verified"
_NEW: Final = "hit.load(), verified"
_COPY: Final = "memcpy"
_HEADS, _TOKENS, _DIM = 2, 256, 64


def measure(settings: Settings) -> dict[str, Any]:
    """Rates of all and their ratios to plain copies."""
    print("host: load beside memcpy", file=sys.stderr, flush=True)
    count, size = settings.host.count, settings.host.nbytes
    source = torch.randint(0, 256, (count, size), dtype=torch.uint8)
    target = torch.zeros(_PER_CALL, size, dtype=torch.uint8)
    capacity = 2 * count * (size + 64 * 1024)
    with HostRecords(capacity) as store, _typed_store(capacity) as typed:
        for first in range(0, count, _PER_CALL):
            store.put(records_of(list(source[first : first + _PER_CALL]), first))
        hits, into = _hits(typed, source)

        def load(turn: int) -> Callable[[], object]:
            first = _first(turn, count)
            requests = [ReadRequest(key_of(first + i), target[i]) for i in range(_PER_CALL)]
            return lambda: _checked(store.read(requests))

        def load_typed(turn: int) -> Callable[[], object]:
            hit = hits[turn % len(hits)]
            return lambda: _checked([True] * len(hit.load(into=into)))

        def load_new(turn: int) -> Callable[[], object]:
            hit = hits[turn % len(hits)]
            return lambda: _checked([True] * len(hit.load()))

        def copy(turn: int) -> Callable[[], object]:
            first = _first(turn, count)
            pairs = [(target[i].numpy(), source[first + i].numpy()) for i in range(_PER_CALL)]
            return lambda: _copied(pairs)

        limits = Limits(seconds=0.2 if settings.repeats < 3 else 4.0, least=5, most=400, warm_up=2)
        ways = {_KVTIER: load, _TYPED: load_typed, _NEW: load_new, _COPY: copy}
        timings = contest([Competitor(*way) for way in ways.items()], limits=limits, between=lambda: None)
    moved = _PER_CALL * size
    return {
        "record_bytes": size,
        "records_per_call": _PER_CALL,
        "rows": [
            {"name": name, **asdict(timing), "gb_per_s": moved / timing.median_s / 1e9}
            for name, timing in timings.items()
        ],
        "vs_memcpy": timings[_COPY].median_s / timings[_KVTIER].median_s,
        "typed_vs_memcpy": timings[_COPY].median_s / timings[_TYPED].median_s,
    }


def _typed_store(capacity: int) -> Store:
    """Half of a host tier is for sessions."""
    return open_store({"tiers": [{"name": "host", "backend": "host", "capacity": 2 * capacity}]})


def _hits(store: Store, source: torch.Tensor) -> tuple[list[Hit], list[KVChunk]]:
    """Leased prefixes of as many chunks as a call takes, of the same bytes; and where to load one."""
    count, size = source.shape
    layers = size // (_HEADS * _TOKENS * 2 * _DIM * 2)
    layout = KVLayout.uniform(
        num_layers=layers, num_kv_heads=_HEADS, key_dim=_DIM, value_dim=_DIM, dtype="bfloat16", chunk_tokens=_TOKENS
    )
    space = store.namespace(model="benchmark", layout=layout)
    halves = source.view(torch.bfloat16).view(count, 2, layers, _HEADS, _TOKENS, _DIM)
    hits = []
    for first in range(0, count, _PER_CALL):
        tokens = range(first * _TOKENS, (first + _PER_CALL) * _TOKENS)
        report = space.put(tokens, [KVChunk(k, v) for k, v in halves[first : first + _PER_CALL]])
        if report.refused:
            raise BenchmarkError(f"the host tier must take all chunks, it refused {report.refused}: {report.reason}")
        hits.append(space.match(tokens, lease_seconds=3600.0))
    places = torch.zeros(_PER_CALL, 2, layers, _HEADS, _TOKENS, _DIM, dtype=torch.bfloat16)
    return hits, [KVChunk(k, v) for k, v in places]


def _first(turn: int, count: int) -> int:
    """Other records each turn, so that they come from memory and not from a cache."""
    return turn * _PER_CALL % count // _PER_CALL * _PER_CALL


def _copied(pairs: Sequence[tuple[ByteRows, ByteRows]]) -> None:
    for into, of in pairs:
        np.copyto(into, of)


def _checked(read: list[bool]) -> None:
    if not all(read):
        raise BenchmarkError(f"the host tier must return all {len(read)} records, it returned {sum(read)}")
