"""Crashes of a store of files: killed under load, and power that goes before anything unsynced is on the medium."""

import shutil
from pathlib import Path

import pytest

from kvtier.testing.crash.check import Promise
from kvtier.testing.crash.kills import Subject, kill_again_and_again
from kvtier.testing.crash.losses import lose_power_again_and_again

OPENING = Path(__file__).with_name("opening.py")
UNBOUNDED = 1 << 62  # a relaxed store promises nothing before a flush
SUBJECTS = {
    "durable": Subject(target=f"{OPENING}:durable", promise=Promise(evicts=True)),
    "relaxed": Subject(
        target=f"{OPENING}:relaxed", promise=Promise(evicts=True, lost_bytes=UNBOUNDED, lost_seconds=UNBOUNDED)
    ),
}
MODES = pytest.mark.parametrize("mode", sorted(SUBJECTS))


def test_killed_at_failpoints_and_anywhere(tmp_path: Path) -> None:
    kills = list(kill_again_and_again(SUBJECTS["durable"], tmp_path, 12, 1))

    assert [(kill.where, kill.findings.problems) for kill in kills if kill.findings.problems] == []
    assert sum(kill.acknowledged for kill in kills) > 0


@MODES
def test_power_losses(mode: str, tmp_path: Path) -> None:
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("needs a C compiler for the recorder")
    losses = list(lose_power_again_and_again(SUBJECTS[mode], tmp_path, 30, 2, each=15))

    assert [(loss.event, loss.findings.problems) for loss in losses if loss.findings.problems] == []
