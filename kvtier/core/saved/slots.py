"""Saved sequences that are buffers on the device: sliding windows, and slots of policies that evict every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.core.kept import KeptSequence
from kvtier.core.saved.description import KeptState, WindowState
from kvtier.core.saved.payload import PayloadReader, PayloadWriter, read_memory, require
from kvtier.errors import RecordFormatError

if TYPE_CHECKING:
    from kvtier.core.group import LayerGroup
    from kvtier.core.ring import WindowSequence
    from kvtier.types import Rope

__all__ = ["fill_window", "restored_kept", "save_kept", "save_window"]


def save_window(sequence: WindowSequence, out: PayloadWriter) -> WindowState:
    """Write what the buffer holds, the unfinished chunk behind the window included."""
    span = slice(sequence.start - sequence.behind, sequence.start + sequence.length)
    return WindowState(
        keys=out.put(sequence.keys[:, span]),
        values=out.put(sequence.values[:, span]),
        positions=out.put(sequence.positions),
        seen=sequence.seen,
        start=sequence.start,
    )


def fill_window(sequence: WindowSequence, state: WindowState, payload: PayloadReader) -> None:
    """Put a saved window into an empty one.

    Raises
    ------
    RecordFormatError
        When the file is damaged, or contradicts itself.
    CapacityError
        When the device has no room.
    """
    layer = sequence.layer
    require(state.positions, "int64", (None,))
    length, held = state.positions.shape[0], state.keys.shape[-2] if len(state.keys.shape) == 3 else 0
    require(state.keys, layer.dtype, (layer.num_kv_heads, held, layer.key_dim))
    require(state.values, layer.dtype, (layer.num_kv_heads, held, layer.value_dim))
    if not length <= held <= state.seen or state.start < held - length:
        raise RecordFormatError(f"a window of {length} tokens, {held} held and {state.seen} seen contradicts itself")
    keys, values, positions = (payload.read(part) for part in (state.keys, state.values, state.positions))
    sequence.put_back(keys, values, positions.numpy(), seen=state.seen, start=state.start)


def save_kept(sequence: KeptSequence, out: PayloadWriter) -> KeptState:
    """Write the slots and their votes."""
    count = sequence.length
    return KeptState(
        keys=out.put(sequence.keys[:, :count]),
        values=out.put(sequence.values[:, :count]),
        positions=out.put(sequence.positions),
        votes=out.put(sequence.votes),
        last_position=sequence.last_position,
        seen=sequence.seen,
        evicted=sequence.evicted,
        budget=sequence.budget,
        capacity=sequence.capacity,
        memory=None if sequence.memory is None else out.put(sequence.memory),
        compact=sequence.compact is not None,
    )


def restored_kept(group: LayerGroup, state: KeptState, rope: Rope | None, payload: PayloadReader) -> KeptSequence:
    """A saved sequence; ``rope`` is how the layer rotates. Raises as `fill_window`."""
    layer = group.layer
    require(state.positions, "int64", (group.heads, None))
    count = state.positions.shape[1]
    require(state.keys, layer.dtype, (group.heads, count, layer.key_dim))
    require(state.values, layer.dtype, (group.heads, count, layer.value_dim))
    require(state.votes, "float32", (layer.num_query_heads, count))
    if state.seen < count or (state.last_position is None) != (count == 0) or (state.compact and rope is None):
        raise RecordFormatError(f"{count} slots of {state.seen} tokens contradict themselves")
    keys, values, votes = (payload.read(part).to(group.device) for part in (state.keys, state.values, state.votes))
    memory = read_memory(payload, state.memory, group)
    sequence = KeptSequence.of(group, keys, values, payload.read(state.positions).numpy(), capacity=state.capacity)
    if bool(votes.any()):
        sequence.vote(votes)
    sequence.last_position, sequence.seen, sequence.evicted = state.last_position, state.seen, state.evicted
    sequence.budget, sequence.memory = state.budget, memory
    sequence.compact = rope if state.compact else None
    return sequence
