"""The cache service on a shared file system: one verified file a record, used by several processes at once.

=====================  ==========================================================================================
`store.FileRecords`     the record store; everything else here is a part of it
`layout`                names of files and directories, and what is found under them
`ledger`                how many bytes the directory holds: one number that all processes keep together
`shelf`                 files into and out of the directory, each change under the ledger's lock
`table`                 what this process knows of the records
`putting`, `reading`    records to and from their files
=====================  ==========================================================================================
"""

from kvtier.storage_backends.files.options import FileOptions
from kvtier.storage_backends.files.store import FileRecords

__all__ = ["FileOptions", "FileRecords"]
