"""The moments of a generation: prompt, first token, the rest."""

import time

import pytest
import torch

from kvtier.cli.stopwatch import Stopwatch


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(int(value))

    def end(self) -> None:
        self.ended += 1


def test_counts_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 12.5, 12.75, 13.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    ticks: list[int] = []
    recorder = Recorder()
    watch = Stopwatch(listener=recorder, on_token=lambda: ticks.append(1))

    for token in range(4):
        watch.put(torch.tensor(token))
    watch.end()

    assert watch.prefill_s == 2.5
    assert watch.decode_s == 0.75
    assert watch.decode_steps == 2
    assert watch.decode_tokens_per_s == pytest.approx(2 / 0.75)
    assert recorder.heard == [0, 1, 2, 3]
    assert recorder.ended == 1
    assert len(ticks) == 3


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_too_few_tokens_have_no_speed(calls: int) -> None:
    watch = Stopwatch()

    for _ in range(calls):
        watch.put(torch.tensor(0))

    assert watch.decode_steps == 0
    assert watch.decode_tokens_per_s == 0.0
    assert (watch.prefill_s > 0) is (calls == 2)
