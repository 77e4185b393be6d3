"""The memory of one patched model: ledgers, tiers and layer groups that all its sessions share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvtier.config import StoreConfig, load_config
from kvtier.core.compose import BoundPolicy, bind
from kvtier.core.group import LayerGroup
from kvtier.core.kept import kept_bytes
from kvtier.core.ledger import Ledger
from kvtier.core.lower import TIER_NAMES
from kvtier.core.pages import HOST, NVME
from kvtier.core.policy import Policy, Scope
from kvtier.core.report import TierReport
from kvtier.core.ring import WindowSequence
from kvtier.core.sequence import LayerSequence
from kvtier.core.session_tiers import ConfiguredTiers, SessionTiers, check_tenant
from kvtier.core.transfer import TransferEngine
from kvtier.errors import CompositionError, ConfigError, SessionStateError
from kvtier.types import Budgets, KVLayout, LayerLayout

if TYPE_CHECKING:
    from kvtier.core.probe import ProbeSession
    from kvtier.core.session import Session

__all__ = ["Memory"]

_TIERS = {"host": HOST, "nvme": NVME}
_CHUNK_SHARE = 8
_HEADROOM = 8  # an eighth of what is kept, for tokens to be generated


class Memory:
    """Tiers under the sessions of one model.

    Parameters
    ----------
    layout : KVLayout
        Shape of the model's KV cache.
    policy : Policy
        What to keep and what to read.
    budgets : Budgets
        Tokens kept and read, bytes of device memory (over all sessions, on each device).
    tiers : StoreConfig or SessionTiers, optional
        Tiers below the device, of its own or lent by `Store.session_tiers`; by default host memory, half of what is
        free now. They are closed with the memory.
    devices : sequence of torch.device, optional
        Device of each layer; the CPU by default.
    tenant : str
        Whose data this is: spill files go into a directory of its own.

    Attributes
    ----------
    logs_reads : bool
        Whether sessions opened from now on log which pages decode steps read, for ``Session.explain``.

    Raises
    ------
    ConfigError, CompositionError
        When the policy, budgets and layout cannot work together.
    StorageError
        When a tier cannot be opened; nothing is left behind.

    Notes
    -----
    Thread-safe: one lock is held by every call of every session. ``close`` frees all tiers.
    """

    def __init__(
        self,
        layout: KVLayout,
        policy: Policy,
        budgets: Budgets,
        tiers: StoreConfig | SessionTiers | None = None,
        devices: Sequence[torch.device] | None = None,
        *,
        tenant: str = "default",
    ) -> None:
        self.layout = layout
        self.tenant = check_tenant(tenant)
        self.devices = tuple(devices) if devices is not None else (torch.device("cpu"),) * len(layout.layers)
        if len(self.devices) != len(layout.layers):
            raise ConfigError(f"devices must name one per layer ({len(layout.layers)}), got {len(self.devices)}")
        self.policy: BoundPolicy = bind(policy, layout, budgets)
        self.budgets = budgets
        self.lock = threading.RLock()
        self.transfer = TransferEngine()
        self.ledgers = {device: Ledger(str(device), budgets.device) for device in dict.fromkeys(self.devices)}
        self.ledger_of = tuple(self.ledgers[device] for device in self.devices)
        self._groups: list[LayerGroup] = []
        self._group_of: dict[int, LayerGroup] = {}
        self._reserved: dict[int, dict[torch.device, int]] = {}
        self._closed = False
        self._open_chunk = 0
        self.logs_reads = False
        if not isinstance(tiers, SessionTiers):
            tiers = ConfiguredTiers(tiers if tiers is not None else load_config(None), self.tenant)
        self._tiers = tiers
        try:
            self._check_parking()
            self._open_groups()
        except BaseException:
            self.close()
            raise

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layer groups, in the order of their first layers."""
        return tuple(self._groups)

    def session(self) -> Session:
        """A new session over these tiers."""
        from kvtier.core.session import Session

        self._check_open()
        return Session(self)

    def restore(self, path: Path | str, *, model: str | None = None) -> Session:
        """A session as `Session.save` wrote it, within the device budget of this memory.

        Parameters
        ----------
        path : Path or str
        model : str, optional
            What was given to `Session.save`.

        Raises
        ------
        RecordFormatError
            The file is no saved session, is damaged or cut short, or of a newer version.
        ConfigError
            It was saved for another model, layout, policy or budget of tokens.
        StorageError
            It cannot be read.
        CapacityError
            When no tier has room.

        Notes
        -----
        Nothing is held after an error. Contents are the same to the bit. Without a device budget and beside no other
        session pages lie where they lay, too, and so attention gives the same bits; under a budget the order of sums
        depends on which pages are on the device.
        """
        session = self.session()
        try:
            session.load(path, model=model)
        except BaseException:
            session.close()
            raise
        return session

    def probe(self, *, layers: int, columns: int) -> ProbeSession:
        """A session for the first run of a prompt of ``columns`` through the first ``layers``; no policy acts on it."""
        from kvtier.core.probe import ProbeSession

        self._check_open()
        return ProbeSession(self, layers=layers, columns=columns)

    def sequence(self, layer: int, *, sketched: bool = True) -> LayerSequence | WindowSequence:
        """An empty sequence for one layer, with sketches if the policy ranks its pages and they are wanted."""
        shape, retrieval = self.layout.layers[layer], self.policy.retrieval
        if shape.window is not None:
            device = self.devices[layer]
            return WindowSequence.empty(shape, shape.window, device, self.ledgers[device], chunk=self._open_chunk)
        return LayerSequence.empty(
            self._group_of[layer], sketched=sketched and retrieval is not None and layer >= retrieval.dense_layers
        )

    def keep_open_chunks(self) -> None:
        """From now on new sessions can read the chunk that is not full yet, in sliding-window layers too."""
        self._open_chunk = self.layout.chunk_tokens

    def max_prefill_chunk(self, rows: int) -> int | None:
        """Most tokens per row of one forward whose raw K and V leave the budget to the pages; None without a budget."""
        limit = self.budgets.device
        if limit is None:
            return None
        widest = max(layer.token_bytes for layer in self.layout.layers)
        block = self.layout.block_tokens
        return max(block, limit // _CHUNK_SHARE // (rows * widest) // block * block)

    def plan(self, session: int, rows: int, *, held: int, coming: int, chunk: int, probing: int | None = None) -> None:
        """Expect ``coming`` tokens a row, ``chunk`` at a time, in ``rows`` distinct rows that hold ``held`` each.

        With ``probing``, in that many first layers, and none is evicted.
        """
        shares = dict.fromkeys(self.ledgers, 0)
        block, keep = self.layout.block_tokens, self.policy.keep if probing is None else None
        depth = len(self.layout.layers) if probing is None else probing
        tokens = held + coming
        for group in self._groups:
            layers, page = [layer for layer in group.layers if layer < depth], group.page_tokens
            budgets = [tokens if keep is None else min(tokens, keep[layer]) for layer in layers]
            count, kept = len(layers), max(budgets, default=0)
            evicting = kept < tokens
            arriving, left = -(-coming // page), [-(-budget // page) for budget in budgets]
            columns = arriving + sum(left) if evicting and chunk >= coming else count * arriving
            used = group.arena.total_frames - group.arena.free_frames
            headroom = sum(pages // _HEADROOM + block // page for pages in left)
            group.planned_frames = used + group.heads * rows * (columns + headroom)
            group.expected_pages = -(-kept // page) + block // page
            staging = group.staging_bytes(2 * group.staging_columns) + (
                kept * group.layer.token_bytes if evicting else 0
            )
            per_row = group.tail_bytes(block) + group.sketch_bytes(group.expected_pages)
            if self.policy.evicts_steps and probing is None:
                per_row += kept_bytes(group, kept)
            shares[group.device] += staging + rows * (count * per_row + chunk * group.layer.token_bytes)
        for layer, device in list(zip(self.layout.layers, self.devices, strict=True))[:depth]:
            if layer.window is not None:
                shares[device] += rows * (layer.window + block + self._open_chunk) * layer.token_bytes
        self._reserve(session, shares)

    def finish(self, session: int) -> None:
        """A session closed: nothing is reserved for it any more; memory that holds nothing is given back."""
        self._reserve(session, {})
        for group in self._groups:
            group.store.settle()
            group.store.drop_empty()

    def tier_reports(self) -> dict[str, TierReport]:
        """Bytes of every tier that exists, summed over groups and devices."""
        limit = self.budgets.device
        idle = sum(group.arena.free_frames * group.arena.frame_bytes for group in self._groups)
        held = sum(ledger.in_use for ledger in self.ledgers.values())
        reports = {
            "device": TierReport(
                capacity=None if limit is None else limit * len(self.ledgers),
                used=held - idle,
                allocated=held,
                peak=sum(ledger.peak for ledger in self.ledgers.values()),
            )
        }
        for tier in (HOST, NVME):
            lowers = [group.store.lower for group in self._groups if tier in group.store.lower.backends]
            backends = [lower.backends[tier] for lower in lowers]
            if backends:
                reports[TIER_NAMES[tier]] = TierReport(
                    capacity=sum(backend.capacity_bytes for backend in backends),
                    used=sum(backend.used_slots * backend.slot_bytes for backend in backends),
                    allocated=sum(backend.allocated_bytes for backend in backends),
                    peak=sum(lower.peak.get(tier, 0) for lower in lowers),
                )
        return reports

    def moved(self) -> dict[str, int]:
        """Bytes written below the device, spilled from host to NVMe, read from below and promoted."""
        names = ("written", "spilled", "read", "promoted")
        return {name: sum(getattr(group.store.lower.traffic, name) for group in self._groups) for name in names}

    def close(self) -> None:
        """Free every tier; sessions still open can no longer be used. Idempotent."""
        with self.lock:
            self._closed = True
            for group in self._groups:
                group.store.settle()
                group.store.lower.close()
            self._tiers.close()
            self.transfer.close()

    def _check_parking(self) -> None:
        """Refuse a policy that waits for all layers where a prompt that comes in chunks could not be put aside."""
        selection = self.policy.selection
        waits = selection is not None and selection.scope is Scope.MODEL
        if selection is not None and waits and self.budgets.device is not None and not self._tiers.capacities:
            raise CompositionError(
                f"{selection.name} evicts when the last layer has seen the prompt, and until then all of it must lie "
                f"somewhere: with device={self.budgets.device} bytes and no tier below, a prompt in chunks has no "
                "place; add a host or nvme tier, or leave device out"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise SessionStateError("this memory is closed; patch the model again")

    def _open_groups(self) -> None:
        shapes: dict[tuple[LayerLayout, torch.device], list[int]] = {}
        for index, (layer, device) in enumerate(zip(self.layout.layers, self.devices, strict=True)):
            if layer.window is None:
                shapes.setdefault((layer, device), []).append(index)
        total = sum(layer.token_bytes * len(indices) for (layer, _), indices in shapes.items())
        for (layer, device), indices in shapes.items():
            group = LayerGroup(
                layers=tuple(indices),
                layer=layer,
                layout=self.layout,
                device=device,
                ledger=self.ledgers[device],
                placement=self.policy.placement,
                retrieval=self.policy.retrieval,
                transfer=self.transfer,
            )
            self._groups.append(group)
            self._group_of.update(dict.fromkeys(indices, group))
            for tier, capacity in self._tiers.capacities.items():
                share = capacity * layer.token_bytes * len(indices) // total
                group.store.lower.backends[_TIERS[tier]] = self._tiers.open(tier, group.arena.frame_bytes, share)
        for device, ledger in self.ledgers.items():
            ledger.reclaim = lambda nbytes, device=device: self._reclaim(device, nbytes)

    def _reclaim(self, device: torch.device, nbytes: int) -> None:
        """Evacuate slabs on a device until ``nbytes`` more fit, the smallest that suffices first."""
        ledger = self.ledgers[device]
        while not ledger.fits(nbytes):
            missing = nbytes - ((ledger.limit or 0) - ledger.in_use)
            slabs = [
                (group.arena.slab_bytes(index), group, index)
                for group in self._groups
                if group.device == device
                for index in range(group.arena.slabs)
            ]
            if not slabs:
                return
            enough = [slab for slab in slabs if slab[0] >= missing]
            _, group, index = min(enough, key=_size) if enough else max(slabs, key=_size)
            group.store.evacuate(index)

    def _reserve(self, session: int, shares: dict[torch.device, int]) -> None:
        self._reserved[session] = shares
        if not shares:
            del self._reserved[session]
        for device, ledger in self.ledgers.items():
            ledger.reserved = sum(held.get(device, 0) for held in self._reserved.values())


def _size(slab: tuple[int, LayerGroup, int]) -> int:
    return slab[0]
