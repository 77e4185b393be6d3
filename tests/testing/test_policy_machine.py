"""Every shipped policy, and compositions, in any order of what a session can do, against their own plans."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.testing.policy_machine import PolicyMachine
from kvtier.testing.session_machine import small_layout
from kvtier.types import Rope

MERGING = 1e-5
ROPE = Rope(frequencies=(1.0, 0.1), scaling=1.1)


class SnapKVQuest(PolicyMachine):
    """Evict once, then read some pages, over a host tier."""

    policy_text: ClassVar = "snapkv(window=3, kernel=3) | quest(dense_layers=1) | arc"
    keep: ClassVar = 24
    read: ClassVar = 16
    device_bytes: ClassVar = 150_000


class QuestSliding(PolicyMachine):
    """Read some pages beside a sliding layer."""

    policy_text: ClassVar = "quest(dense_layers=0) | s3fifo"
    layout: ClassVar = small_layout(window=13)
    read: ClassVar = 12
    device_bytes: ClassVar = 400_000


class PyramidTiered(PolicyMachine):
    """Budgets that differ from layer to layer."""

    policy_text: ClassVar = "pyramidkv(window=3, beta=2) | lfu"
    keep: ClassVar = 16
    device_bytes: ClassVar = 150_000


class Expected(PolicyMachine):
    """Moments of queries before rotation."""

    policy_text: ClassVar = "expected_attention(n_future=9, n_sink=2) | quest(dense_layers=1)"
    layout: ClassVar = small_layout(window=13, rope=ROPE)
    keep: ClassVar = 20
    read: ClassVar = 16


class MergedOnce(PolicyMachine):
    """Merging at the end of a prompt, over all layers at once."""

    policy_text: ClassVar = "d2o(sinks=1, recent=3) | quest(dense_layers=2)"
    keep: ClassVar = 14
    read: ClassVar = 16
    device_bytes: ClassVar = 400_000
    tolerance: ClassVar = MERGING


class MergedAtEveryStep(PolicyMachine):
    """Merging after every step, with a threshold that travels with its sequence."""

    policy_text: ClassVar = "d2o(sinks=1, recent=3, when='step')"
    layout: ClassVar = small_layout(window=13)
    keep: ClassVar = 12
    tolerance: ClassVar = MERGING


class HeavyHitters(PolicyMachine):
    """Running votes."""

    policy_text: ClassVar = "h2o(recent=3) | lru"
    keep: ClassVar = 12


class Newest(PolicyMachine):
    """The newest query's votes."""

    policy_text: ClassVar = "tova"
    keep: ClassVar = 11


class Streaming(PolicyMachine):
    """Sinks and a window where they were."""

    policy_text: ClassVar = "streamingllm(sinks=2)"
    keep: ClassVar = 10


class StreamingCompact(PolicyMachine):
    """Sinks and a window, renumbered."""

    policy_text: ClassVar = "streamingllm(sinks=2, positions='compact')"
    layout: ClassVar = small_layout(window=13, rope=ROPE)
    keep: ClassVar = 10


class StreamingCompactWithoutSinks(PolicyMachine):
    """A window alone, renumbered."""

    policy_text: ClassVar = "streamingllm(sinks=0, positions='compact')"
    layout: ClassVar = small_layout(rope=ROPE)
    keep: ClassVar = 7


MACHINES = (
    SnapKVQuest,
    QuestSliding,
    PyramidTiered,
    Expected,
    MergedOnce,
    MergedAtEveryStep,
    HeavyHitters,
    Newest,
    Streaming,
    StreamingCompact,
    StreamingCompactWithoutSinks,
)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_any_order_of_operations_equals_the_plans(machine: type[PolicyMachine]) -> None:
    # Short runs find what long ones find, and shrink faster.
    chosen = settings()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis leaves it untyped
        machine, settings=settings(max_examples=max(4, chosen.max_examples // 4), stateful_step_count=8)
    )
