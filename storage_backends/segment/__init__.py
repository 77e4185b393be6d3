"""The cache service on a drive: verified records in segments of large, preallocated, log-structured files.

=====================  ==========================================================================================
`store.SegmentRecords`  the record store; everything else here is a part of it
`options`               sizes, and how the capacity is divided
`pool`                  the segment files: taken, begun and given back whole
`allocator`             where the next record goes
`reclaim`               which segment goes when there is no room
`draft`, `writer`       records to the medium, sealed while others are under way
`reader`                and from it, verified in the I/O threads
`catalog`, `table`      what is known of the records, in memory
`index`, `flusher`      the same on disk, written behind
`opening`, `recovery`   what a directory holds after whatever happened to it
=====================  ==========================================================================================
"""

from kvtier.storage_backends.segment.lock import DirectoryLock
from kvtier.storage_backends.segment.options import SegmentOptions, options_of
from kvtier.storage_backends.segment.store import SegmentRecords
from kvtier.storage_backends.segment.verify import StoreSummary, VerifyReport

__all__ = ["DirectoryLock", "SegmentOptions", "SegmentRecords", "StoreSummary", "VerifyReport", "options_of"]
