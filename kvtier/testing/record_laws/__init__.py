"""The laws of record stores: subclass `RecordStoreLaws` in a test file and they run on your store."""

from kvtier.testing.record_laws.base import Fault, FreshStore
from kvtier.testing.record_laws.capacity import CapacityLaws
from kvtier.testing.record_laws.damage import DamageLaws
from kvtier.testing.record_laws.leases import LeaseLaws
from kvtier.testing.record_laws.lifetime import LifetimeLaws
from kvtier.testing.record_laws.machine import MachineLaws
from kvtier.testing.record_laws.reopening import ReopeningLaws
from kvtier.testing.record_laws.threads import ThreadLaws
from kvtier.testing.record_laws.transfers import TransferLaws
from kvtier.testing.record_samples import OpenStore

__all__ = ["Fault", "FreshStore", "OpenStore", "RecordStoreLaws"]


class RecordStoreLaws(
    TransferLaws, LifetimeLaws, LeaseLaws, CapacityLaws, DamageLaws, ReopeningLaws, ThreadLaws, MachineLaws
):
    """What every record store keeps; override the fixture ``store``.

    Laws about bytes that outlive the store are skipped, with the reason, where its capabilities say that none do. A
    store whose bytes are not in files of its directory overrides ``faults`` too, or the laws of damage are skipped.

    Attributes
    ----------
    capacity_bytes : int
        Bound that the laws open stores with, 16 MiB unless overridden. They fill it several times; their records are at
        most 1/32 of it.

    Examples
    --------
    ::

        class TestMyRecords(RecordStoreLaws):
            @pytest.fixture
            def store(self) -> OpenStore:
                return lambda directory, capacity_bytes: MyRecords(directory, capacity_bytes)
    """
