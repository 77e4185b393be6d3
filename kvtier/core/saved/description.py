"""What a saved session says of itself: JSON that tells what is in which bytes of the payload."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvtier.errors import RecordFormatError

__all__ = [
    "ARRAY_ALIGNMENT",
    "Array",
    "Description",
    "GroupImage",
    "Identity",
    "KeptState",
    "LayerIdentity",
    "PagedState",
    "PromptState",
    "RaggedState",
    "SameState",
    "SequenceState",
    "Shared",
    "WindowState",
    "parse_description",
]

ARRAY_ALIGNMENT = 64

Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 62)]

_DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip


class _Strict(BaseModel):
    """Nothing missing, nothing more, no value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Array(_Strict):
    """Numbers in row-major order at byte ``at`` of the payload, a multiple of 64."""

    dtype: Literal[
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
    ]  # fmt: skip
    shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]
    at: Count

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first dimension."""
        return math.prod(self.shape[1:]) * _DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


class LayerIdentity(_Strict):
    """Shape of one layer; ``rope`` is a digest of how it rotates, None where that is not known."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    window: int | None
    rope: str | None


class Identity(_Strict):
    """What must be the same where a session is restored.

    Parameters
    ----------
    model : str, optional
        The fingerprint that was given when it was saved.
    policies : tuple of str
        Selection and retrieval with their parameters; placement has no say in what a session holds.
    keep : tuple of int, optional
        Tokens kept per KV head, layer by layer.
    """

    model: str | None
    layers: tuple[LayerIdentity, ...]
    page_tokens: int
    block_tokens: int
    policies: tuple[str, ...]
    keep: tuple[int, ...] | None
    read: int | None


class PromptState(_Strict):
    """Where the last prompt ended, in columns; whether prompts are announced."""

    end: Count | None
    announced: bool


class GroupImage(_Strict):
    """How the pages of a layer group lay on a device without a budget: frames of each slab, and what was planned."""

    slabs: tuple[Count, ...]
    planned_frames: Count
    expected_pages: Count


class Shared(_Strict):
    """The first page columns are those of the same layer in an earlier row."""

    row: Count
    columns: Count


class SameState(_Strict):
    """The same as an earlier row in this layer: a fork of it."""

    kind: Literal["same"] = "same"
    row: Count


class PagedState(_Strict):
    """A `LayerSequence`.

    Parameters
    ----------
    pages : Array
        [n, Hk, P * (Dk + Dv)]: page columns behind the shared ones; of each page K [P, Dk], then V [P, Dv].
    frames : Array, optional
        Where they lay [Hk, n] int64, counted over the slabs of the group; None when that is of no use.
    positions : Array
        [1 or Hk, slots] int64, of all slots: those in pages, then those of the tail.
    sketch : dict
        [Hk, pages, ...] by name, shared columns included.
    tail_keys, tail_values : Array
        [Hk, t, Dk] and [Hk, t, Dv].
    evicted : int
        Slots that the last eviction left.
    memory : Array, optional
        What the policy remembers of its last merge [1, Hk, S].
    """

    kind: Literal["paged"] = "paged"
    shared: Shared | None
    pages: Array
    frames: Array | None
    positions: Array
    sketch: dict[str, Array] | None
    tail_keys: Array
    tail_values: Array
    evicted: Count
    memory: Array | None


class RaggedState(_Strict):
    """A `RaggedSequence`.

    Parameters
    ----------
    shared : int, optional
        The earlier row whose kept pages these are; the four arrays are None then.
    pages : Array
        [n, P * (Dk + Dv)], those of one KV head after those of another.
    frames : Array, optional
        Where they lay [n].
    counts : Array
        Tokens [Hk] of each KV head.
    positions : Array
        [Hk, most tokens] int64, 2^63 - 1 behind those of a KV head.
    newest : int
        Position of the last token before the eviction; -1 when there was none.
    """

    kind: Literal["ragged"] = "ragged"
    shared: Count | None
    pages: Array | None
    frames: Array | None
    counts: Array | None
    positions: Array | None
    newest: int
    recent: PagedState


class KeptState(_Strict):
    """A `KeptSequence`: slots K [Hk, n, Dk], V [Hk, n, Dv] at ``positions`` [Hk, n], with votes [Hq, n] fp32."""

    kind: Literal["kept"] = "kept"
    keys: Array
    values: Array
    positions: Array
    votes: Array
    last_position: int | None
    seen: Count
    evicted: bool
    budget: Count
    capacity: Count
    memory: Array | None
    compact: bool


class WindowState(_Strict):
    """A `WindowSequence`: tokens K [Hk, n, Dk], V [Hk, n, Dv]; the last of them, as many as positions, are seen."""

    kind: Literal["window"] = "window"
    keys: Array
    values: Array
    positions: Array
    seen: Count
    start: Count


SequenceState: TypeAlias = Annotated[
    SameState | PagedState | RaggedState | KeptState | WindowState, Field(discriminator="kind")
]


class Description(_Strict):
    """A whole session.

    Parameters
    ----------
    columns : int
        Seen by every layer, padding included.
    history : tuple
        Stretches of columns: how many, and (start, stop) of the real tokens of each row, or None where all are.
    recording : bool
        Whether sliding-window layers keep what a crop may need.
    rows : tuple
        ``rows[b][layer]``.
    attached : dict
        What the owner of the session keeps beside it, such as token ids.
    """

    identity: Identity
    columns: Count
    history: tuple[tuple[Count, tuple[tuple[Count, Count], ...] | None], ...]
    prompt: PromptState
    recording: bool
    groups: tuple[GroupImage, ...]
    rows: tuple[tuple[SequenceState, ...], ...]
    attached: dict[str, Array]


def parse_description(data: bytes) -> Description:
    """Read the JSON of a description.

    Raises
    ------
    RecordFormatError
        It is not what this version writes.
    """
    try:
        return Description.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecordFormatError(f"the description makes no sense at {place or 'its start'}: {first['msg']}") from error
