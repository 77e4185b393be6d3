"""Layers of one shape on one device: their arena, their tiers, and how much of the device budget goes to pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kvtier.core.arena import Arena
from kvtier.core.ledger import Ledger
from kvtier.core.lower import LowerTiers
from kvtier.core.pages import PageTable
from kvtier.core.policy import IntArray, PlacementPolicy, RetrievalPolicy
from kvtier.core.tier import PageStore
from kvtier.core.transfer import TransferEngine
from kvtier.types import DTYPE_BYTES, KVLayout, LayerLayout

__all__ = ["LayerGroup"]

_STAGING_BYTES = 8 << 20
_STAGING_SHARE = 8
_BUFFERS = 2


class LayerGroup:
    """What the layers of one shape on one device share.

    Parameters
    ----------
    layers : tuple of int
        Their indices in the model.

    Attributes
    ----------
    head_rows : array
        Numbers of the KV heads [Hk, 1]: with columns [Hk, n] they index a page table.

    Notes
    -----
    Called under the lock of the memory that owns it.
    """

    def __init__(
        self,
        *,
        layers: tuple[int, ...],
        layer: LayerLayout,
        layout: KVLayout,
        device: torch.device,
        ledger: Ledger,
        placement: PlacementPolicy,
        retrieval: RetrievalPolicy | None,
        transfer: TransferEngine,
    ) -> None:
        self.layers = layers
        self.layer = layer
        self.heads = layer.num_kv_heads
        self.head_rows: IntArray = np.arange(self.heads)[:, None]
        self.page_tokens = layout.page_tokens
        self.block_tokens = layout.block_tokens
        self.device = device
        self.ledger = ledger
        self.retrieval = retrieval
        self.dtype: torch.dtype = getattr(torch, layer.dtype)
        self.expected_pages = 0
        self.planned_frames = 0
        self.arena = Arena(layer, layout.page_tokens, device, ledger)
        table = PageTable()
        self.store = PageStore(
            arena=self.arena,
            table=table,
            lower=LowerTiers(self.arena, table, placement),
            order=placement.order(),
            transfer=transfer,
            bounded=ledger.limit is not None,
            block_pages=layout.block_tokens // layout.page_tokens,
            growth=self._growth,
        )

    @property
    def column_bytes(self) -> int:
        """Bytes of one page of every KV head."""
        return self.heads * self.arena.frame_bytes

    @property
    def staging_columns(self) -> int:
        """Page columns that are read ahead at once when they are not on the device."""
        limit = self.ledger.limit
        share = _STAGING_BYTES if limit is None else min(_STAGING_BYTES, limit // _STAGING_SHARE)
        return max(1, share // self.column_bytes)

    def staging_bytes(self, columns: int) -> int:
        """Bytes of ``columns`` read ahead in groups: one in use, one on its way."""
        return min(columns, _BUFFERS * self.staging_columns) * self.column_bytes

    @contextmanager
    def staging(self, columns: int) -> Iterator[int]:
        """Count the staging bytes while ``columns`` are read ahead; yields how many to read at once."""
        with self.ledger.lent("staging", self.staging_bytes(columns)):
            yield min(columns, self.staging_columns)

    def piece_tokens(self) -> int:
        """Tokens whose pages fill half of what the arena may become."""
        room = self.ledger.page_room() or 0
        frames = self.arena.total_frames + max(0, room) // self.arena.frame_bytes
        return frames // 2 // self.heads * self.page_tokens

    def low_water(self) -> int:
        """Free frames below which pages are copied down ahead of need: one block of every layer, a quarter at most."""
        blocks = len(self.layers) * self.heads * self.block_tokens // self.page_tokens
        return min(blocks, self.arena.total_frames // 4)

    def tail_bytes(self, tokens: int) -> int:
        """Bytes of a tail of this many tokens."""
        return tokens * self.layer.token_bytes

    def sketch_bytes(self, pages: int) -> int:
        """Bytes of the sketches of this many pages of every KV head."""
        if self.retrieval is None:
            return 0
        return pages * self.heads * self.retrieval.sketch_bytes(self.layer.key_dim, DTYPE_BYTES[self.layer.dtype])

    def one_run_each(self, columns: int) -> int:
        """Frames with which one sequence of every layer goes on in a run of its own of ``columns``."""
        return len(self.layers) * self.heads * columns

    def new_tail(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An uninitialised tail K [Hk, tokens, Dk], V [Hk, tokens, Dv], counted."""
        self.ledger.take("tails", self.tail_bytes(tokens))
        shape = (self.heads, tokens)
        keys = torch.empty(*shape, self.layer.key_dim, dtype=self.dtype, device=self.device)
        return keys, torch.empty(*shape, self.layer.value_dim, dtype=self.dtype, device=self.device)

    def give_tail(self, tokens: int) -> None:
        """A tail of this many tokens was dropped."""
        self.ledger.give("tails", self.tail_bytes(tokens))

    def _growth(self, short: int, columns: int) -> int:
        """Frames to add when ``short`` are missing: what is planned, at least an eighth, within the room for pages.

        Without a budget every layer gets a run of ``columns``, if that is more.
        """
        held = self.arena.total_frames
        wanted = max(short, self.planned_frames - held, held // 8)
        room = self.ledger.page_room()
        if room is None:
            return max(wanted, self.one_run_each(columns))
        frames = min(wanted, max(0, room) // self.arena.frame_bytes)
        worthwhile = frames >= short or frames >= max(held // 8, self.heads)
        return frames if worthwhile else 0
