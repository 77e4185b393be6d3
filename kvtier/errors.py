"""Every exception that kvtier raises on purpose.

::

    KVTierError
    ├── ConfigError (ValueError)            a setting, size, name or file of settings is wrong
    │   ├── PolicyError                     unknown policy, or a hyper-parameter out of its range
    │   └── CompositionError                policies that cannot work together, or not on this model
    ├── InputError (ValueError)             a prompt, document, tensor or position is wrong
    │   └── MaskError                       an attention mask that paging cannot honour
    ├── UnsupportedModelError (TypeError)   a model or cache that the patch cannot serve
    ├── SessionStateError (RuntimeError)    a call that does not fit the state of the session
    ├── CapacityError (MemoryError)         no tier has room for what must be kept
    ├── StorageError (OSError)              a tier could not be opened, read or written
    │   ├── DamagedSlotsError               stored bytes do not match their digest
    │   ├── RecordFormatError               bytes that are no record, or not one of this place
    │   │   └── RecordVersionError          whole, but of a version of the format that this release does not know
    │   └── StoreInUseError                 another process has the directory open
    ├── PagesLostError (RuntimeError)       pages of a live session are gone; ``handle.recover()`` re-prefills
    └── MissingDependencyError (ImportError)  an optional package is not installed

A message says what was required, what was got, and what to do.
"""

from collections.abc import Sequence

__all__ = [
    "CapacityError",
    "CompositionError",
    "ConfigError",
    "DamagedSlotsError",
    "InputError",
    "KVTierError",
    "MaskError",
    "MissingDependencyError",
    "PagesLostError",
    "PolicyError",
    "RecordFormatError",
    "RecordVersionError",
    "SessionStateError",
    "StorageError",
    "StoreInUseError",
    "UnsupportedModelError",
]


class KVTierError(Exception):
    """Base of every error of kvtier."""


class ConfigError(KVTierError, ValueError):
    """A setting, a size, a name or a file of settings is wrong."""


class PolicyError(ConfigError):
    """An unknown policy, or a hyper-parameter out of its range."""


class CompositionError(ConfigError):
    """Policies that cannot work together, or a policy that cannot work on this model."""


class InputError(KVTierError, ValueError):
    """A prompt, document, tensor or position is wrong."""


class MaskError(InputError):
    """An attention mask that paging cannot honour."""


class UnsupportedModelError(KVTierError, TypeError):
    """A model or a cache object that the patch cannot serve."""


class SessionStateError(KVTierError, RuntimeError):
    """A call that does not fit the state of the session."""


class CapacityError(KVTierError, MemoryError):
    """No tier has room for what must be kept; nothing was written."""


class StorageError(KVTierError, OSError):
    """A tier could not be opened, read or written."""


class DamagedSlotsError(StorageError):
    """Stored bytes that do not match their digest.

    Attributes
    ----------
    slots : tuple of int
        The damaged slots, ascending.
    """

    def __init__(self, message: str, slots: Sequence[int]) -> None:
        super().__init__(message)
        self.slots = tuple(slots)


class RecordFormatError(StorageError):
    """Bytes that are no record, segment or saved session, are damaged, or belong to another place."""


class RecordVersionError(RecordFormatError):
    """Bytes that are whole, but of a version of the format that this release does not know."""


class StoreInUseError(StorageError):
    """Another process, or another store of this one, has the directory open."""


class PagesLostError(KVTierError, RuntimeError):
    """Pages of a live session are gone; ``handle.recover()`` runs the prompt again."""


class MissingDependencyError(KVTierError, ImportError):
    """An optional package is not installed."""
