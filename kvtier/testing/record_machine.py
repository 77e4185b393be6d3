"""A state machine that holds a record store against a dict, under faults and from several threads, for Hypothesis."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
import xxhash
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.storage_backends.records import ByteRange, Lease, PutState, ReadRequest, RecordStore
from kvtier.testing.record_samples import OpenStore, generation_of, sample_bytes, sample_key, sample_record

__all__ = ["Fault", "RecordMachine"]

Fault: TypeAlias = Callable[[RecordStore | None, Path, random.Random], None]
"""Damages what a store has stored, or orders damage: ``(store, directory, random)``; the store is None when closed."""

_THREADS = 3
_TRIES = 20
_FLOOD = 40
_FILLERS = [500, *range(1000, 1000 + _FLOOD)]
_WAIT_S = 60
_SIZES = st.sampled_from([16, 4096, 5000, 65_536, 70_001, 150_000])
_NUMBERS = st.integers(0, 9)
_TENANTS = ("a", "b")
_Verb: TypeAlias = Literal["put", "delete", "read"]
_CALLS = st.lists(st.tuples(st.sampled_from(["put", "put", "delete", "read"]), st.integers(0, 3)), max_size=5)


class _Kept(NamedTuple):
    """What the dict holds of a record; ``doubtful``: a fault may have taken it since."""

    generation: int
    size: int
    tenant: str
    doubtful: bool = False


@dataclass(slots=True)
class _Call:
    """A call of one of the threads, and what came of it."""

    verb: str
    number: int
    generation: int
    stored: bool = False
    existed: bool = False
    deleted: int = 0
    seen: bytes | None = None


class RecordMachine(RuleBasedStateMachine):
    """Puts, reads, deletes, leases, reopens and damages at random; a dict says what every read must give.

    A record may be missing only if the store says that it evicted it, or if a fault came after it was stored. It is
    never wrong. What was deleted, or was found damaged, stays away; only where two different files were damaged, one of
    them since, may an opening find it again, for its tombstone and the index are both lost then. Once a fault is healed
    and the store reopened, it keeps what it takes again.

    Parameters
    ----------
    opens : OpenStore
        Opens the store.
    parent : Path
        Existing directory for the store's own.
    capacity_bytes : int
        Bound to open it with.
    faults : sequence of Fault
        Ways to hurt it; none: it must lose nothing.
    heal : callable, optional
        Ends whatever the faults ordered for later.
    """

    def __init__(
        self,
        opens: OpenStore,
        parent: Path,
        capacity_bytes: int,
        faults: Sequence[Fault] = (),
        heal: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.opens, self.capacity_bytes, self.faults, self.heal = opens, capacity_bytes, faults, heal
        self.directory = Path(tempfile.mkdtemp(dir=parent))
        self.store = opens(self.directory, capacity_bytes)
        self.persistent = self.store.capabilities().persistent
        self.kept: dict[int, _Kept] = {}
        self.gone: list[tuple[int, _Kept]] = []
        self.revivable: list[tuple[int, _Kept]] = []
        self.damaged: set[str] = set()
        self.leases: list[Lease] = []
        self.generation = 0
        self.flooded = False
        self.unsteady = False
        self.evicted = 0

    @rule(
        numbers=st.lists(_NUMBERS, min_size=1, max_size=3, unique=True), size=_SIZES, tenant=st.sampled_from(_TENANTS)
    )
    def put(self, numbers: list[int], size: int, tenant: str) -> None:
        """A new record is stored, one that exists is left as it is."""
        self.generation += 1
        kept = dict(self.kept)  # as it was: the call may evict a record after it found it
        records = [sample_record(n, size, generation=self.generation, tenant=tenant) for n in numbers]
        outcomes = self.store.put(records)
        note(f"put {numbers} as generation {self.generation}: {[outcome.state.name for outcome in outcomes]}")
        evicted = self._settle_evictions()
        for number, outcome in zip(numbers, outcomes, strict=True):
            before = kept.get(number)
            match outcome.state:
                case PutState.STORED:
                    assert before is None or before.doubtful or evicted, f"record {number} was there"
                    self.kept[number] = _Kept(self.generation, size, tenant, self.unsteady)
                case PutState.EXISTS:
                    assert before is not None, f"record {number} does not exist"
                case PutState.REFUSED:
                    assert self.unsteady, f"refused without a cause: {outcome.reason}"

    @rule(number=_NUMBERS)
    def read(self, number: int) -> None:
        """A read gives what was put."""
        self._check(number)

    @rule(number=_NUMBERS, part=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def read_a_range(self, number: int, part: tuple[float, float]) -> None:
        """So does a read of a part."""
        kept = self.kept.get(number)
        if kept is None:
            return
        start, end = sorted(int(edge * kept.size) for edge in part)
        into = torch.zeros(end - start, dtype=torch.uint8)
        (served,) = self.store.read([ReadRequest(sample_key(number), into, (ByteRange(start, end - start),))])
        if served:
            assert into.numpy().tobytes() == sample_bytes(number, kept.generation, kept.size)[start:end]
        else:
            self._excuse(number)

    @rule(numbers=st.lists(_NUMBERS, max_size=4))
    def delete(self, numbers: list[int]) -> None:
        """Deleted records are gone, and were counted."""
        kept = [self._lose(number) for number in set(numbers) if number in self.kept]
        count = self.store.delete([sample_key(number) for number in numbers])
        note(f"delete {numbers}: {count}")
        assert len(kept) - sum(one.doubtful for one in kept) <= count <= len(kept)
        assert not self.store.contains([sample_key(number) for number in numbers]).any()

    @rule(tenant=st.sampled_from([*_TENANTS, None]))
    def clear(self, tenant: str | None) -> None:
        """A tenant's records are gone, the other's are not."""
        self.store.clear(tenant)
        for number in [n for n, one in self.kept.items() if tenant in {None, one.tenant}]:
            self._lose(number)

    @rule(numbers=st.lists(_NUMBERS, max_size=4))
    def lease(self, numbers: list[int]) -> None:
        """Leases name what is there."""
        lease = self.store.lease([sample_key(number) for number in numbers], owner="machine", seconds=600)
        assert set(lease.keys) <= {sample_key(number) for number in self.kept}
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule()
    def release_all(self) -> None:
        """All released: nothing is pinned."""
        while self.leases:
            self.leases.pop().release()
        assert self.store.stats().leased_bytes == 0

    @precondition(lambda self: not self.unsteady and not self.flooded)
    @rule()
    def flood(self) -> None:
        """More than the capacity passes through; what is leased stays."""
        self.flooded = True
        self.lease(sorted(self.kept)[::2])
        leased = {key for lease in self.leases for key in lease.keys}
        pinned = [n for n, one in self.kept.items() if sample_key(n) in leased and not one.doubtful]
        for turn in range(_FLOOD):
            self.store.put([sample_record(1000 + turn, self.capacity_bytes // 32)])
        self.store.delete([sample_key(number) for number in _FILLERS])
        self._settle_evictions()
        assert all(number in self.kept for number in pinned), "a leased record was evicted"

    @precondition(lambda self: not self.unsteady)
    @rule(calls=st.tuples(*[_CALLS] * _THREADS))
    def several_threads(self, calls: tuple[list[tuple[_Verb, int]], ...]) -> None:
        """Calls beside each other come out as if they had come one after the other."""
        for number in range(4):
            self._check(number)
        plans = [[_Call(verb, number, self._next()) for verb, number in plan] for plan in calls]
        start = threading.Barrier(_THREADS)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda plan: self._perform(plan, start), plans))
        done = [call for plan in plans for call in plan]
        note(f"threads: {plans}")
        missing = sum(self._linear(number, [call for call in done if call.number == number]) for number in range(4))
        assert missing <= self._settle_evictions(), "records are missing that were neither deleted nor evicted"

    @precondition(lambda self: self.persistent)
    @rule()
    def reopen(self) -> None:
        """Closed and opened, it holds the same."""
        self._close()
        self._open_again()
        note(f"reopened, kept {sorted(self.kept)}")

    @precondition(lambda self: self.faults and self.persistent)
    @rule(seed=st.integers(0, 2**32 - 1))
    def hurt_closed(self, seed: int) -> None:
        """Damaged while it was closed, it opens, and what it holds is right."""
        self._close()
        self._hurt(None, seed)
        self._open_again()

    @precondition(lambda self: self.faults)
    @rule(seed=st.integers(0, 2**32 - 1))
    def hurt_open(self, seed: int) -> None:
        """Hurt while it is open, it serves what is right, and nothing else."""
        self._hurt(self.store, seed)
        self.unsteady = True

    @precondition(lambda self: self.unsteady)
    @rule()
    def heal_and_go_on(self) -> None:
        """When the medium is well again, the store takes records again."""
        self.heal()
        for _ in range(_TRIES):
            (outcome,) = self.store.put([sample_record(500, 5000)])
            self.store.delete([sample_key(500)])
            if outcome.state is PutState.STORED:
                return
        if self.persistent:
            self.reopen()
            (outcome,) = self.store.put([sample_record(500, 5000)])
            self.store.delete([sample_key(500)])
        assert outcome.state is PutState.STORED, f"the store does not recover: {outcome.reason}"

    @invariant()
    def the_counters_agree(self) -> None:
        """Within the bound, and consistent with each other."""
        stats = self.store.stats()
        assert stats.held_bytes <= stats.capacity_bytes <= self.capacity_bytes
        assert sum(stats.tenants.values()) == stats.live_bytes
        assert stats.live_bytes <= stats.held_bytes or self.damaged, "a file cut short holds less than is claimed of it"
        assert stats.records <= len(self.kept)
        certain = sum(not one.doubtful for one in self.kept.values())
        assert stats.records >= certain

    def teardown(self) -> None:
        """Everything kept is read once more; then the store goes."""
        for number in sorted(self.kept):
            self._check(number)
        self._close()
        self.heal()
        shutil.rmtree(self.directory)

    def _next(self) -> int:
        self.generation += 1
        return self.generation

    def _perform(self, plan: list[_Call], start: threading.Barrier) -> None:
        start.wait(_WAIT_S)
        for call in plan:
            match call.verb:
                case "put":
                    record = sample_record(call.number, 9000, generation=call.generation, tenant=_TENANTS[0])
                    (outcome,) = self.store.put([record])
                    call.stored = outcome.state is PutState.STORED
                    call.existed = outcome.state is PutState.EXISTS
                case "delete":
                    call.deleted = self.store.delete([sample_key(call.number)])
                case _:
                    call.seen = self._fetch(call.number)

    def _linear(self, number: int, calls: list[_Call]) -> int:
        """Compare the calls on one record with what any order of them allows; how many losses are unexplained."""
        before = self.kept.pop(number, None)
        stored = {call.generation for call in calls if call.stored}
        deleted = sum(call.deleted for call in calls)
        possible = stored | ({before.generation} if before else set())
        for call in calls:
            assert not call.existed or possible, f"record {number} never existed"
            if call.seen is not None:
                assert generation_of(number, call.seen) in possible, f"record {number}: wrong bytes"
        left = self._fetch(number)
        if left is not None:
            generation = generation_of(number, left)
            assert generation is not None
            assert generation in ({before.generation} if before and not deleted and not stored else possible)
            tenant = before.tenant if before and generation == before.generation else _TENANTS[0]
            self.kept[number] = _Kept(generation, len(left), tenant)
        sizes = dict.fromkeys(stored, _Kept(0, 9000, _TENANTS[0])) | ({before.generation: before} if before else {})
        self.gone += [
            (number, one._replace(generation=g)) for g, one in sizes.items() if left is None or g != generation
        ]
        missing = (before is not None) + len(stored) - deleted - (left is not None)
        assert missing >= 0, f"record {number} came from nowhere"
        return missing

    def _fetch(self, number: int) -> bytes | None:
        info = self.store.info(sample_key(number))
        if info is None:
            return None
        into = torch.zeros(info.payload_bytes, dtype=torch.uint8)
        try:
            (served,) = self.store.read([ReadRequest(info.key, into)])
        except ValueError:  # replaced by a record of another size in between: the target does not fit
            return None
        return into.numpy().tobytes() if served else None

    def _check(self, number: int) -> None:
        """Read a record and compare."""
        kept = self.kept.get(number)
        into = torch.zeros(kept.size if kept else 5000, dtype=torch.uint8)
        (served,) = self.store.read([ReadRequest(sample_key(number), into)])
        note(f"read {number}: {'hit' if served else 'miss'}, expected {kept}")
        if served:
            assert kept is not None, f"record {number} is back"
            assert into.numpy().tobytes() == sample_bytes(number, kept.generation, kept.size), "a wrong byte"
        elif kept is not None:
            self._excuse(number)

    def _excuse(self, number: int) -> None:
        """A record is missing: a fault may have taken it, or the law is broken. What is gone stays away."""
        assert self.kept[number].doubtful, f"record {number} is missing, and nothing happened to it"
        if not self.store.contains([sample_key(number)])[0]:
            self._lose(number)
        else:
            assert self.unsteady, f"record {number} is damaged, and still claimed"

    def _settle_evictions(self) -> int:
        """Drop from the dict what was evicted since the last time; how many records were, fillers among them."""
        before, self.evicted = self.evicted, self.store.stats().evicted
        if self.evicted > before:
            there = self.store.contains([sample_key(number) for number in self.kept])
            self.kept = {n: one for (n, one), is_there in zip(self.kept.items(), there, strict=True) if is_there}
        return self.evicted - before

    def _hurt(self, store: RecordStore | None, seed: int) -> None:
        rng = random.Random(seed)
        before = self._files()
        rng.choice(self.faults)(store, self.directory, rng)
        after = self._files()
        self.damaged |= {name.split(".")[0] for name in before if before[name] != after.get(name)}
        self.revivable, self.gone = self.revivable + self.gone, []
        self.kept = {number: one._replace(doubtful=True) for number, one in self.kept.items()}

    def _files(self) -> dict[str, bytes]:
        """Digests of the files: one and its companions, such as a log, share the name up to the first dot."""
        paths = [path for path in self.directory.rglob("*") if path.is_file()]
        return {path.name: xxhash.xxh3_64_digest(path.read_bytes()) for path in paths}

    def _lose(self, number: int) -> _Kept:
        """It is gone by request, or because it was damaged."""
        kept = self.kept.pop(number)
        self.gone.append((number, kept))
        return kept

    def _open_again(self) -> None:
        self.heal()
        self.store, self.evicted, self.unsteady = self.opens(self.directory, self.capacity_bytes), 0, False
        if len(self.damaged) > 1:
            self._take_back()

    def _take_back(self) -> None:
        """What two damages together brought back is kept again; fillers are not wanted."""
        self.store.delete([sample_key(number) for number in _FILLERS])
        for number in {number for number, _ in self.revivable}:
            data = self._fetch(number)
            if data is None:
                continue
            generation = generation_of(number, data)
            for other, one in self.revivable:
                if other == number and one.generation == generation:
                    self.kept[number] = one._replace(doubtful=True)

    def _close(self) -> None:
        self.leases.clear()
        self.store.close()
