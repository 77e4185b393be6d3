"""The session, in any order of its operations, equals plain tensors on every arrangement of tiers."""

from __future__ import annotations

import tempfile
from typing import ClassVar

from hypothesis import settings

from kvtier.testing.dense_heads import AdaKVRule, DenseHeadsSession
from kvtier.testing.session_machine import SessionMachine, small_layout


class Unbounded(SessionMachine):
    """Everything on the device."""


class OnHost(SessionMachine):
    """A device that holds a fraction, the rest on the host."""

    policy_text: ClassVar = "full | arc"
    device_bytes: ClassVar = 150_000


class OnNvme(SessionMachine):
    """A device and a host that hold a fraction each, the rest in a file."""

    policy_text: ClassVar = "full | s3fifo"
    device_bytes: ClassVar = 150_000
    tiers: ClassVar = {
        "tiers": [
            {"name": "host", "backend": "host", "capacity": "16KiB"},
            {"name": "nvme", "backend": "spill", "capacity": "16MiB", "path": tempfile.gettempdir()},
        ]
    }


class Sliding(SessionMachine):
    """A sliding-window layer between two full ones."""

    layout: ClassVar = small_layout(window=13)
    device_bytes: ClassVar = 1_000_000


class Retrieving(SessionMachine):
    """Quest with a read budget that covers everything, over tiers: chosen pages are all pages."""

    policy_text: ClassVar = "quest(dense_layers=1, read=100000) | lfu"
    device_bytes: ClassVar = 400_000


class SharingHeads(SessionMachine):
    """AdaKV, which leaves KV heads of different lengths after every append of several tokens."""

    layout: ClassVar = small_layout(heads=3)
    policy_text: ClassVar = "adakv(window=2, kernel=3)"
    keep: ClassVar = 11

    def make_oracle(self) -> DenseHeadsSession:
        return DenseHeadsSession(self.layout, AdaKVRule(window=2, kernel=3, keep=11))


class SharingHeadsOnHost(SharingHeads):
    """The same on a device that holds a fraction."""

    device_bytes: ClassVar = 150_000


for machine in (Unbounded, OnHost, OnNvme, Sliding, Retrieving, SharingHeads, SharingHeadsOnHost):
    # Short runs find what long ones find, and shrink faster.
    machine.TestCase.settings = settings(stateful_step_count=16)

TestUnbounded = Unbounded.TestCase
TestOnHost = OnHost.TestCase
TestOnNvme = OnNvme.TestCase
TestSliding = Sliding.TestCase
TestRetrieving = Retrieving.TestCase
TestSharingHeads = SharingHeads.TestCase
TestSharingHeadsOnHost = SharingHeadsOnHost.TestCase
