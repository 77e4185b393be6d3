"""A store of files against a dict, in any order of calls, with and without faults."""

from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.testing.record_laws.base import file_damage
from kvtier.testing.record_machine import RecordMachine

STEPS = settings(
    settings.get_profile("fast"),
    max_examples=10,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
CAPACITY = 2 << 20


def opens(directory: Path, capacity_bytes: int) -> FileRecords:
    return FileRecords(directory, FileOptions(capacity=capacity_bytes))


def test_it_is_a_dict_that_forgets(tmp_path: Path) -> None:
    run_state_machine_as_test(lambda: RecordMachine(opens, tmp_path, CAPACITY), settings=STEPS)


def test_it_is_right_or_missing_under_faults(tmp_path: Path) -> None:
    run_state_machine_as_test(lambda: RecordMachine(opens, tmp_path, CAPACITY, (file_damage,)), settings=STEPS)
