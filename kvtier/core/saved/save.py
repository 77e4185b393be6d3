"""Writing a session to a file: verified reads from every tier, bounded memory, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import xxhash

from kvtier.core.kept import KeptSequence
from kvtier.core.ragged import RaggedSequence
from kvtier.core.ring import WindowSequence
from kvtier.core.saved.description import Description, PromptState, SameState, SequenceState
from kvtier.core.saved.header import SavedHeader
from kvtier.core.saved.identity import identity_of
from kvtier.core.saved.image import image_of
from kvtier.core.saved.paged import save_paged, save_ragged
from kvtier.core.saved.payload import PayloadWriter, write_at
from kvtier.core.saved.slots import save_kept, save_window
from kvtier.errors import SessionStateError, StorageError
from kvtier.record import BLOCK_BYTES
from kvtier.storage_backends.engines.posix import PosixEngine
from kvtier.storage_backends.whole_file import whole_file

if TYPE_CHECKING:
    from kvtier.core.attention import AnySequence
    from kvtier.core.batch import Batch
    from kvtier.core.columns import ColumnHistory
    from kvtier.storage_backends.engines.base import EngineFile, IOEngine

__all__ = ["Seen", "save_batch"]


class Seen(NamedTuple):
    """What a session knows beside its rows: columns, which were real, whether windows keep what a crop may need."""

    columns: int
    history: ColumnHistory
    recording: bool


def save_batch(
    path: Path,
    batch: Batch,
    seen: Seen,
    *,
    model: str | None,
    attached: Mapping[str, torch.Tensor],
    engine: IOEngine | None = None,
) -> int:
    """Write the rows of a session; bytes of the file, which appears whole or not at all. The engine is closed then.

    Raises
    ------
    SessionStateError
        While a prompt runs whose statistics a policy waits for.
    PagesLostError
        When a page in a lower tier is damaged or cannot be read.
    StorageError
        When the file cannot be written.
    """
    if batch.prompt.watched:
        raise SessionStateError(
            "a prompt is running, and the policy has seen a part of it; save when it has ended, or before it begins"
        )
    try:
        with engine or PosixEngine() as opened, whole_file(opened, path) as file:
            payload = PayloadWriter(opened, file)
            description = Description(
                identity=identity_of(batch.memory, model),
                columns=seen.columns,
                history=tuple(seen.history.stretches),
                prompt=PromptState(end=batch.prompt.end, announced=batch.prompt.announced),
                recording=seen.recording,
                groups=tuple(image_of(group) for group in batch.memory.groups),
                rows=_save_rows(batch.rows, payload),
                attached={name: payload.put(tensor) for name, tensor in attached.items()},
            )
            return _finish(opened, file, payload, description)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot save the session to {path}: {error.strerror or error}; make room or choose another place"
        ) from error


def _save_rows(rows: Sequence[Sequence[AnySequence]], payload: PayloadWriter) -> tuple[tuple[SequenceState, ...], ...]:
    """Write layer by layer, so that what rows share is written once."""
    layers = [
        [_save(sequence, held[:row], payload) for row, sequence in enumerate(held)] for held in zip(*rows, strict=True)
    ]
    return tuple(zip(*layers, strict=True))


def _save(sequence: AnySequence, earlier: Sequence[AnySequence], payload: PayloadWriter) -> SequenceState:
    if isinstance(sequence, KeptSequence):
        return save_kept(sequence, payload)  # rows may agree on tokens, and not on votes
    for row, other in enumerate(earlier):
        if other.version is sequence.version:
            return SameState(row=row)
    if isinstance(sequence, WindowSequence):
        return save_window(sequence, payload)
    if isinstance(sequence, RaggedSequence):
        return save_ragged(sequence, earlier, payload)
    return save_paged(sequence, earlier, payload)


def _finish(engine: IOEngine, file: EngineFile, payload: PayloadWriter, description: Description) -> int:
    """Write the digests, the description, and at last the header."""
    payload_bytes = payload.finish()
    digests = _whole(bytes(payload.digests), b"\0")
    text = _whole(description.model_dump_json().encode(), b" ")
    header = SavedHeader(
        payload_bytes=payload_bytes,
        description_bytes=len(text),
        created_us=time.time_ns() // 1000,
        digests_digest=xxhash.xxh3_128_digest(digests),
        description_digest=xxhash.xxh3_128_digest(text),
    )
    for at, data in ((header.digests_at, digests), (header.description_at, text), (0, header.pack())):
        if data:
            write_at(engine, file, at, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return header.file_bytes


def _whole(data: bytes, filler: bytes) -> bytes:
    return data + filler * (-len(data) % BLOCK_BYTES)
