"""Laws of threads: any of them may call anything, and none ever sees a wrong byte."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from kvtier.storage_backends.records import PutState
from kvtier.testing.record_laws.base import FreshStore, LawsBase
from kvtier.testing.record_samples import fetch, generation_of, sample_bytes, sample_key, sample_record

__all__ = ["ThreadLaws"]

_WAIT_S = 60


class ThreadLaws(LawsBase):
    """Puts, reads, deletes and evictions beside each other."""

    def test_one_of_many_puts_of_a_key_wins(self, fresh: FreshStore) -> None:
        """Four threads put a key at once, each with its own bytes: one is stored, and all read that one's."""
        start = threading.Barrier(4)

        with fresh() as store, ThreadPoolExecutor(4) as pool:

            def race(worker: int) -> list[tuple[PutState, bytes | None]]:
                seen = []
                for number in range(25):
                    start.wait(_WAIT_S)
                    (outcome,) = store.put([sample_record(number, 8000, generation=worker)])
                    seen.append((outcome.state, fetch(store, number, 8000)))
                return seen

            races = list(pool.map(race, range(4)))
            assert store.stats().records == 25
        for number in range(25):
            states = [race[number][0] for race in races]
            assert sorted(state.name for state in states) == ["EXISTS"] * 3 + ["STORED"]
            winner = sample_bytes(number, states.index(PutState.STORED), 8000)
            assert {race[number][1] for race in races} == {winner}, "a put returned before its record was visible"

    def test_no_reader_ever_sees_a_wrong_byte(self, fresh: FreshStore) -> None:
        """Readers of a few keys beside threads that replace, evict and clear them: one whole generation or a miss."""
        size = self.capacity_bytes // 48
        ended = threading.Event()

        with fresh() as store, ThreadPoolExecutor(4) as pool:

            def write(worker: int) -> None:
                rng = random.Random(worker)
                for turn in range(120):
                    number = rng.randrange(6)
                    if turn % 3 == 0:
                        store.put([sample_record(1000 + worker * 1000 + turn, size)])
                    store.delete([sample_key(number)])
                    store.put([sample_record(number, size, generation=worker * 1000 + turn)])
                    if turn % 40 == 39:
                        store.clear("default")

            def read(worker: int) -> int:
                rng, right = random.Random(worker), 0
                while not ended.is_set():
                    number = rng.randrange(6)
                    if (served := fetch(store, number, size)) is not None:
                        assert generation_of(number, served) is not None, f"record {number}: a wrong byte"
                        right += 1
                return right

            readers = [pool.submit(read, worker) for worker in (2, 3)]
            writers = [pool.submit(write, worker) for worker in (0, 1)]
            try:
                for writer in writers:
                    writer.result()
            finally:
                ended.set()
            assert sum(reader.result() for reader in readers) > 0
            assert store.stats().damaged == 0, "an overwritten record was taken for a damaged one"

    def test_closing_under_load_is_calm(self, fresh: FreshStore) -> None:
        """`close` beside transfers waits for them; calls that come late miss and are refused."""
        with fresh() as store, ThreadPoolExecutor(3) as pool:
            begun = threading.Barrier(4)

            def work(worker: int) -> None:
                begun.wait(_WAIT_S)
                for turn in range(40):
                    number = worker * 100 + turn
                    store.put([sample_record(number, 30_000)])
                    served = fetch(store, number, 30_000)
                    assert served in {None, sample_bytes(number, 0, 30_000)}

            workers = [pool.submit(work, worker) for worker in range(3)]
            begun.wait(_WAIT_S)
            store.close()
            for worker in workers:
                worker.result()
