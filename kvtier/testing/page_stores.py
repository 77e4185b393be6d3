"""A page store of one small layer, whose pages hold numbers that name them: what tests demote, damage and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
import torch

from kvtier.core.arena import Arena
from kvtier.core.ledger import Ledger
from kvtier.core.lower import LowerTiers
from kvtier.core.pages import HOST, NVME, PageTable
from kvtier.core.policy import IntArray, PlacementPolicy
from kvtier.core.tier import PageStore
from kvtier.core.transfer import TransferEngine
from kvtier.registry import policies
from kvtier.storage_backends.base import SlotBackend
from kvtier.storage_backends.host import HostSlots
from kvtier.storage_backends.spill_file import SpillFile
from kvtier.storage_backends.wrappers import MeteredSlots, VerifiedSlots
from kvtier.testing.faults import FaultySlots
from kvtier.types import LayerLayout

__all__ = ["NumberedPages"]

_LAYER = LayerLayout(num_query_heads=2, num_kv_heads=2, key_dim=3, value_dim=2, dtype="float64")
_PAGE_TOKENS = 4


class NumberedPages:
    """A page store with room for ``frames`` pages on the device, ``host`` and ``nvme`` pages below.

    Attributes
    ----------
    store : PageStore
    numbers : dict of int to int
        What each page that was made holds, by its id.
    faults, meters : dict of int to wrapper
        By tier: where faults are ordered, below the digests, and where transfers are counted, above them.
    """

    def __init__(self, frames: int | None, *, host: int = 0, nvme: int = 0, directory: Path | None = None) -> None:
        self.numbers: dict[int, int] = {}
        self.faults: dict[int, FaultySlots] = {}
        self.meters: dict[int, MeteredSlots] = {}
        self._made = 0
        size = _PAGE_TOKENS * (_LAYER.key_dim + _LAYER.value_dim) * 8
        self.ledger = Ledger("cpu", None if frames is None else frames * size)
        arena, table = Arena(_LAYER, _PAGE_TOKENS, torch.device("cpu"), self.ledger), PageTable()
        placement: PlacementPolicy = policies.resolve("lru")()
        if host:
            self._add(HOST, HostSlots(size, host))
        if nvme and directory is not None:
            self._add(NVME, SpillFile(size, nvme, directory))
        backends: dict[int, SlotBackend] = dict(self.meters)
        self.store = PageStore(
            arena=arena,
            table=table,
            lower=LowerTiers(arena, table, placement, backends),
            order=placement.order(),
            transfer=TransferEngine(),
            bounded=frames is not None,
            block_pages=2,
            growth=self._growth,
        )

    def new(self, columns: int, *, heads: int = _LAYER.num_kv_heads) -> IntArray:
        """Make pages [heads, columns], each filled with a number of its own."""
        pages = self.store.new_pages(heads, columns)
        flat = pages.ravel()
        numbers = np.arange(self._made, self._made + flat.size)
        self._made += flat.size
        self.numbers.update(zip(flat.tolist(), numbers.tolist(), strict=True))
        self.store.arena.write(self.store.frames(flat), *self.expected(flat))
        return pages

    def expected(self, pages: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """What these pages [n] hold: K [n, P, Dk] and V [n, P, Dv]."""
        numbers = torch.tensor([self.numbers[page] for page in pages.tolist()], dtype=torch.float64)
        slots = torch.arange(_PAGE_TOKENS, dtype=torch.float64)[None, :, None] / 8
        keys = numbers[:, None, None] + slots + torch.arange(_LAYER.key_dim) / 64
        return keys, -(numbers[:, None, None] + slots + torch.arange(_LAYER.value_dim) / 64)

    def wrong(self, pages: IntArray) -> list[int]:
        """Which of these pages [n] do not read back as they were made."""
        keys, values = self.store.read(pages)
        right_keys, right_values = self.expected(pages)
        same = (keys == right_keys).flatten(1).all(1) & (values == right_values).flatten(1).all(1)
        found: list[int] = pages[~same.numpy()].tolist()
        return found

    def wrong_copies(self) -> list[tuple[int, int]]:
        """Tier and page of every copy below the device that differs from what the page was made with."""
        self.store.settle()
        table, bad = self.store.table, []
        for tier in self.meters:
            pages = np.flatnonzero(table.copy[tier])
            keys, values = self.store.lower.read(tier, table.slot[tier][pages])
            right_keys, right_values = self.expected(pages)
            same = (keys == right_keys).flatten(1).all(1) & (values == right_values).flatten(1).all(1)
            bad += [(tier, int(page)) for page in pages[~same.numpy()]]
        return bad

    def uncounted(self) -> list[str]:
        """Where frames, slots or bytes do not agree with the page table; empty when all do."""
        self.store.settle()
        arena, table = self.store.arena, self.store.table
        counts = {
            "frames": (arena.total_frames - arena.free_frames, int(table.copy[0].sum())),
            "device bytes": (self.ledger.in_use, arena.total_frames * arena.frame_bytes),
            "pages": (table.live, int(table.copy.any(axis=0).sum())),
        }
        for tier, backend in self.meters.items():
            counts[f"slots of tier {tier}"] = (backend.used_slots, int(table.copy[tier].sum()))
        return [f"{what}: {held} held, {known} known" for what, (held, known) in counts.items() if held != known]

    def close(self) -> None:
        """End background copies and close the tiers."""
        self.store.settle()
        self.store.transfer.close()
        self.store.lower.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, tier: int, backend: SlotBackend) -> None:
        self.faults[tier] = FaultySlots(backend)
        self.meters[tier] = MeteredSlots(VerifiedSlots(self.faults[tier]))

    def _growth(self, short: int, columns: int) -> int:
        room = self.ledger.page_room()
        return short if room is None else min(short, max(0, room) // self.store.arena.frame_bytes)
