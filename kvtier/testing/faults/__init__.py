"""What goes wrong with media, on order: around slot backends, around I/O engines, and in files at rest."""

from kvtier.testing.faults.engine import FaultyEngine, ReadFault, WriteFault
from kvtier.testing.faults.files import damage_files, flip_bit, swap_pages, truncate_file
from kvtier.testing.faults.slots import FaultySlots

__all__ = [
    "FaultyEngine",
    "FaultySlots",
    "ReadFault",
    "WriteFault",
    "damage_files",
    "flip_bit",
    "swap_pages",
    "truncate_file",
]
