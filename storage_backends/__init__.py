"""Where the pages of a live session go when they leave the device: bounded places for byte slots of one size.

=========================  ===============================================================================
`host.HostSlots`           memory of the host, page-locked where CUDA allows it, grown and shrunk in slabs
`spill_file.SpillFile`     one preallocated file without a name, direct I/O where the file system allows it
`wrappers.VerifiedSlots`   around another backend: a digest per slot, checked on every read
`wrappers.MeteredSlots`    around another backend: calls, bytes and seconds
=========================  ===============================================================================

A new backend subclasses `base.SlotBackend` and its test subclasses `kvtier.testing.backend_laws.SlotBackendLaws`.
"""

from kvtier.storage_backends.base import Capabilities, IntArray, SlotBackend
from kvtier.storage_backends.host import HostSlots
from kvtier.storage_backends.spill_file import SpillFile
from kvtier.storage_backends.wrappers import MeteredSlots, Meters, VerifiedSlots

__all__ = [
    "Capabilities",
    "HostSlots",
    "IntArray",
    "MeteredSlots",
    "Meters",
    "SlotBackend",
    "SpillFile",
    "VerifiedSlots",
]
