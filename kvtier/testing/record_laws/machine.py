"""The law of all laws: any sequence of calls and faults agrees with a dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.testing.record_laws.base import LAW, Fault, LawsBase, file_damage
from kvtier.testing.record_machine import RecordMachine
from kvtier.testing.record_samples import OpenStore

__all__ = ["FaultMachineLaws", "MachineLaws"]

_SMALLER = 4
"""The machine floods the store: with a part of the capacity it does so in a part of the time."""

# Shrinking runs stores and threads for minutes, and races make it flaky: the first failing run is shown as it was.
_LONG = settings(LAW, stateful_step_count=30, phases=[Phase.explicit, Phase.reuse, Phase.generate])


class FaultMachineLaws(LawsBase):
    """The state machine under faults."""

    @pytest.fixture
    def heal(self) -> Callable[[], None]:
        """End what ``faults`` ordered for later; override it together with them."""
        return lambda: None

    def test_any_sequence_of_calls_and_faults_agrees_with_a_dict(
        self, store: OpenStore, faults: Sequence[Fault], heal: Callable[[], None], tmp_path: Path
    ) -> None:
        """Whatever is done to its bytes, it is a dict that may also forget."""
        with store(tmp_path, self.capacity_bytes) as opened:
            if file_damage in faults and not opened.capabilities().persistent:
                pytest.skip("the store has no files that could be damaged: override the fixture 'faults'")
        capacity_bytes = self.capacity_bytes // _SMALLER

        class Machine(RecordMachine):
            def __init__(self) -> None:
                super().__init__(store, tmp_path, capacity_bytes, faults, heal)

        run_state_machine_as_test(Machine, settings=_LONG)


class MachineLaws(FaultMachineLaws):
    """The state machine, without faults and under them."""

    def test_any_sequence_of_calls_agrees_with_a_dict(self, store: OpenStore, tmp_path: Path) -> None:
        """The store is a dict that may evict and outlives its closing."""
        capacity_bytes = self.capacity_bytes // _SMALLER

        class Machine(RecordMachine):
            def __init__(self) -> None:
                super().__init__(store, tmp_path, capacity_bytes)

        run_state_machine_as_test(Machine, settings=_LONG)
