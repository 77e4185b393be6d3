"""Reading a saved session: everything that says what the bytes are is verified before any of them is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from kvtier.core.columns import ColumnHistory
from kvtier.core.kept import KeptSequence
from kvtier.core.policy import Phase
from kvtier.core.ring import WindowSequence
from kvtier.core.saved.description import (
    Array,
    Description,
    KeptState,
    PagedState,
    RaggedState,
    SameState,
    SequenceState,
    WindowState,
    parse_description,
)
from kvtier.core.saved.header import check_part, parse_saved_header
from kvtier.core.saved.identity import check_identity, identity_of
from kvtier.core.saved.image import Image, rebuilt
from kvtier.core.saved.paged import fill_paged, fill_ragged
from kvtier.core.saved.payload import PayloadReader, read_at
from kvtier.core.saved.slots import fill_window, restored_kept
from kvtier.core.sequence import LayerSequence
from kvtier.errors import RecordFormatError, StorageError
from kvtier.record import BLOCK_BYTES
from kvtier.storage_backends.engines.posix import PosixEngine

if TYPE_CHECKING:
    import torch

    from kvtier.core.attention import AnySequence
    from kvtier.core.batch import Batch
    from kvtier.core.memory import Memory
    from kvtier.storage_backends.engines.base import EngineFile, IOEngine

__all__ = ["Saved", "open_saved"]


@contextmanager
def open_saved(path: Path, memory: Memory, model: str | None, engine: IOEngine | None = None) -> Iterator[Saved]:
    """A saved session that fits a memory, open to be read; the engine is closed then.

    Raises
    ------
    RecordFormatError
        The file is no saved session, is damaged or cut short, or of a newer version; also later, as bytes are read.
    ConfigError
        It was saved for another model, layout, policy or budget of tokens.
    StorageError
        It cannot be read; also later.
    """
    try:
        with engine or PosixEngine() as opened:
            file = opened.open(path, writable=False)
            try:
                yield _opened(opened, file, memory, model)
            finally:
                file.close()
    except RecordFormatError as error:
        raise RecordFormatError(f"{path} cannot be restored: {error}") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read the session in {path}: {error.strerror or error}") from error


def _opened(engine: IOEngine, file: EngineFile, memory: Memory, model: str | None) -> Saved:
    if file.size < BLOCK_BYTES:
        raise RecordFormatError(f"a saved session has at least {BLOCK_BYTES} bytes, got {file.size}")
    header = parse_saved_header(read_at(engine, file, 0, BLOCK_BYTES).numpy().data, file.size)
    digests = _part(engine, file, header.digests_at, header.digests_bytes)
    check_part("the list of digests", digests, header.digests_digest)
    text = _part(engine, file, header.description_at, header.description_bytes)
    check_part("the description", text, header.description_digest)
    description = parse_description(text)
    payload = PayloadReader(engine, file, header.payload_bytes, digests, header.extent_bytes)
    payload.check(_arrays((description.rows, description.attached)))
    check_identity(description.identity, identity_of(memory, model))
    _check_shape(description, memory)
    return Saved(memory, description, payload)


def _part(engine: IOEngine, file: EngineFile, at: int, count: int) -> bytes:
    return read_at(engine, file, at, count).numpy().tobytes() if count else b""


def _arrays(value: object) -> Iterator[Array]:
    """All arrays in a part of a description."""
    if isinstance(value, Array):
        yield value
    elif isinstance(value, BaseModel):
        yield from _arrays(tuple(inner for _, inner in value))
    elif isinstance(value, dict | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _arrays(inner)


def _check_shape(description: Description, memory: Memory) -> None:
    """Refuse rows that do not have every layer, and histories of other columns."""
    layers, rows = len(memory.layout.layers), len(description.rows)
    columns = sum(columns for columns, _ in description.history)
    spans = [(width, real) for width, real in description.history if real is not None]
    inside = all(start <= stop <= width for width, real in spans for start, stop in real)
    if any(len(row) != layers for row in description.rows) or any(len(real) != rows for _, real in spans) or not inside:
        raise RecordFormatError(f"{rows} rows must have {layers} layers each, and a span in every stretch")
    if columns != description.columns or len(description.groups) != len(memory.groups):
        raise RecordFormatError(f"a history of {columns} columns contradicts {description.columns}")


@dataclass(frozen=True, slots=True)
class Saved:
    """An open file, and what it says of itself, checked against the memory it is restored into."""

    memory: Memory
    description: Description
    payload: PayloadReader

    @property
    def history(self) -> ColumnHistory:
        """Which columns were real tokens of which rows."""
        return ColumnHistory(self.description.history)

    @property
    def tokens(self) -> int:
        """Slots of the longest sequence that is in pages or evicts every step."""
        lengths = [0]
        for row in self.description.rows:
            for state in row:
                if isinstance(state, RaggedState) and state.positions is not None:
                    lengths.append(state.positions.shape[-1] + state.recent.positions.shape[-1])
                elif isinstance(state, PagedState | KeptState):
                    lengths.append(state.positions.shape[-1])
        return max(lengths)

    def attached(self) -> dict[str, torch.Tensor]:
        """What the owner of the session kept beside it, on the CPU; raises as `fill`."""
        return {name: self.payload.read(array) for name, array in self.description.attached.items()}

    def fill(self, batch: Batch) -> None:
        """Put everything into the empty rows of a session; after an error they must be released.

        Raises
        ------
        RecordFormatError, StorageError
            The file is damaged, contradicts itself, or cannot be read.
        CapacityError
            When no tier of the memory has room.
        """
        batch.prompt.end, batch.prompt.announced = self.description.prompt.end, self.description.prompt.announced
        for group, image in zip(self.memory.groups, self.description.groups, strict=True):
            lying = rebuilt(group, image, self._pages(group.layers))
            for layer in group.layers:
                self._fill_layer(batch, layer, lying)
        for layer, shape in enumerate(self.memory.layout.layers):
            if shape.window is not None:
                self._fill_layer(batch, layer, None)

    def _pages(self, layers: Sequence[int]) -> int:
        """Pages that the file holds for some layers."""
        arrays = [
            part.pages
            for row in self.description.rows
            for state in (row[layer] for layer in layers)
            for part in ((state, state.recent) if isinstance(state, RaggedState) else (state,))
            if isinstance(part, PagedState | RaggedState)
        ]
        heads = self.memory.layout.layers[layers[0]].num_kv_heads
        return sum(0 if one is None else one.shape[0] * (heads if len(one.shape) == 3 else 1) for one in arrays)

    def _fill_layer(self, batch: Batch, layer: int, image: Image | None) -> None:
        for row, states in enumerate(self.description.rows):
            earlier = [sequences[layer] for sequences in batch.rows[:row]]
            empty = batch.rows[row][layer]
            batch.rows[row][layer] = self._restored(states[layer], layer, empty, earlier, image)

    def _restored(
        self,
        state: SequenceState,
        layer: int,
        empty: AnySequence,
        earlier: Sequence[AnySequence],
        image: Image | None,
    ) -> AnySequence:
        """One sequence, into or in place of an empty one."""
        if isinstance(state, SameState):
            if state.row >= len(earlier):
                raise RecordFormatError(f"row {len(earlier)} cannot be a fork of row {state.row}")
            empty.release()
            return earlier[state.row].fork()
        if isinstance(state, WindowState) and isinstance(empty, WindowSequence):
            fill_window(empty, state, self.payload)
        elif isinstance(state, PagedState) and isinstance(empty, LayerSequence):
            fill_paged(empty, state, earlier, self.payload, image)
        elif isinstance(state, RaggedState) and isinstance(empty, LayerSequence) and self._selects(state):
            return fill_ragged(empty, state, earlier, self.payload, image)
        elif isinstance(state, KeptState) and isinstance(empty, LayerSequence) and self._selects(state):
            rope = self.memory.layout.layers[layer].rope
            kept: KeptSequence = restored_kept(empty.group, state, rope, self.payload)
            empty.release()
            return kept
        else:
            raise RecordFormatError(f"layer {layer} cannot hold a sequence of the kind {state.kind!r}")
        return empty

    def _selects(self, state: SequenceState) -> bool:
        """Whether the policy makes sequences of this kind."""
        selection = self.memory.policy.selection
        if selection is None:
            return False
        return selection.phase is Phase.DECODE if isinstance(state, KeptState) else selection.shares_heads
