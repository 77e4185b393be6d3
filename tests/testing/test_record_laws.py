"""The laws of record stores hold for the reference store, and each catches a store that breaks it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.records import RecordStore
from kvtier.testing.crash.load import load_target
from kvtier.testing.record_laws import Fault, OpenStore, RecordStoreLaws
from kvtier.testing.record_laws.base import LAW, LawsBase, file_damage
from kvtier.testing.record_laws.machine import MachineLaws
from kvtier.testing.record_machine import RecordMachine
from kvtier.testing.reference_records import ReferenceRecords

BROKEN = Path(__file__).with_name("broken_records.py")


class TestReferenceRecords(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return ReferenceRecords


class InMemory(ReferenceRecords):
    """Does not keep its records: the laws that need it skip, and damage is done by other means than to files."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), persistent=False)


class TestStoreWithoutPersistence(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return InMemory

    @pytest.fixture
    def faults(self) -> Sequence[Fault]:
        def flip(store: RecordStore | None, directory: Path, rng: random.Random) -> None:
            if paths := sorted(directory.iterdir()):
                path = rng.choice(paths)
                data = bytearray(path.read_bytes())
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data)

        return (flip,)


CAUGHT = {
    "ServesUnverifiedBytes": ["test_damage_to_an_open_store", "test_damage_to_a_closed_store"],
    "KeepsDamagedRecords": ["test_damage_to_an_open_store"],
    "CountsNothing": ["test_damage_to_an_open_store", "test_damage_to_a_closed_store"],
    "RaisesOnDamage": ["test_damage_to_an_open_store"],
    "ForgetsCapacity": ["test_the_capacity_is_hard_at_every_moment"],
    "CountsLess": ["test_the_capacity_is_hard_at_every_moment", "test_old_records_make_room_for_new_ones"],
    "NeverEvicts": ["test_old_records_make_room_for_new_ones"],
    "EvictsLeased": ["test_eviction_never_touches_a_leased_record", "test_a_store_full_of_leases_refuses_and_recovers"],
    "LeaksLeases": ["test_all_leases_released_pin_nothing"],
    "LeasesNeverRunOut": ["test_a_lease_runs_out"],
    "ResurrectsAtReopening": ["test_what_was_deleted_stays_deleted"],
    "OverwritesRecords": ["test_a_record_never_changes", "test_one_of_many_puts_of_a_key_wins"],
    "ServesWrongRanges": ["test_ranges_are_slices"],
    "ServesShortRecords": ["test_ranges_beyond_the_payload_are_never_served"],
    "KeepsTheCallersBuffers": ["test_buffers_belong_to_the_caller_again"],
    "ClearsEverybody": ["test_clear_forgets_one_tenant_or_all"],
    "ForgetsMeta": ["test_what_is_known_of_a_record_is_what_was_put"],
    "ScansAtRandom": ["test_scan_is_in_the_order_of_storing"],
    "ForgetsAtClosing": ["test_opening_again_finds_everything"],
    "RaisesWhenClosed": ["test_close_is_idempotent_and_final"],
    "PublishesEarly": ["test_one_of_many_puts_of_a_key_wins"],
    "MiscountsMisses": ["test_a_batch_is_answered_request_by_request"],
    "RemovesForeignFiles": ["test_files_that_are_not_ours_do_not_matter"],
}
BY_THE_MACHINE = ["EvictsLeased", "ResurrectsAtReopening", "OverwritesRecords", "PublishesEarly"]


def caught(name: str, laws: Sequence[str]) -> type[LawsBase]:
    """Some of the laws, on a store that breaks them: each must fail."""

    class Caught(LawsBase):
        @pytest.fixture
        def store(self) -> OpenStore:
            return load_target(f"{BROKEN}:{name}")

        heal = MachineLaws.heal

    for law in laws:
        setattr(Caught, law, getattr(RecordStoreLaws, law))
    must_fail = pytest.mark.xfail(strict=True, raises=(AssertionError, ExceptionGroup, OSError), reason="it is broken")
    suite: type[LawsBase] = must_fail(type(f"Test{name}", (Caught,), {}))
    return suite


for broken, laws in CAUGHT.items():
    globals()[f"Test{broken}"] = caught(broken, laws)


@pytest.mark.parametrize("broken", BY_THE_MACHINE)
def test_the_machine_catches(broken: str, tmp_path: Path) -> None:
    opens = load_target(f"{BROKEN}:{broken}")

    class Machine(RecordMachine):
        def __init__(self) -> None:
            super().__init__(opens, tmp_path, 2 << 20, [file_damage])

    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(Machine, settings=settings(LAW, max_examples=200, phases=[Phase.generate]))
