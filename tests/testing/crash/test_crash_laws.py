"""The crash laws hold for the reference store, and catch stores that sync too little or too late."""

from pathlib import Path

import pytest

from kvtier.testing.crash.kills import Subject, kill_again_and_again
from kvtier.testing.crash.losses import lose_power_again_and_again
from kvtier.testing.crash_laws import CrashLaws

BROKEN = Path(__file__).parents[1] / "broken_records.py"


class TestReferenceRecordsCrash(CrashLaws):
    kills, power_losses, corruptions = 8, 20, 40

    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(target="kvtier.testing.reference_records:ReferenceRecords")


@pytest.mark.parametrize("broken", ["SkipsSync", "SkipsDirectorySync", "SyncsTooLate", "TrustsTornFiles"])
def test_a_power_loss_catches(broken: str, tmp_path: Path) -> None:
    losses = lose_power_again_and_again(Subject(target=f"{BROKEN}:{broken}"), tmp_path, 100, seed=0)
    assert any(loss.findings.problems for loss in losses)


@pytest.mark.parametrize("broken", ["ServesTornFiles", "AcknowledgesEarly"])
def test_a_kill_catches(broken: str, tmp_path: Path) -> None:
    kills = kill_again_and_again(Subject(target=f"{BROKEN}:{broken}"), tmp_path, 60, seed=0)
    assert any(kill.findings.problems for kill in kills)
