"""Keys of prefixes: keyed BLAKE2b over a canonical byte encoding, chained from chunk to chunk.

A namespace digest stands for everything that must be the same before two KV caches of equal tokens are equal; it is
keyed by the tenant's salt, so that tenants with different salts share nothing. The key of chunk i digests the key of
chunk i - 1 (of chunk 0, the namespace digest) and the chunk's token ids as little-endian int64: the whole prefix.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvtier.errors import InputError
from kvtier.types import KVLayout

__all__ = [
    "FORMAT_VERSION",
    "ChunkMeta",
    "Identity",
    "canonical_bytes",
    "chunk_keys",
    "namespace_digest",
    "token_bytes",
]

FORMAT_VERSION = 1
"""Of the keys and of the payload; another version is another namespace."""

Identity: TypeAlias = "bool | int | float | str | bytes | Sequence[Identity] | Mapping[str, Identity] | None"
"""What a namespace may be told apart by."""

TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor"
"""Token ids [T] on any device."""

_DIGEST_BYTES = 32
_SALT_PERSON, _SPACE_PERSON, _CHUNK_PERSON = b"kvtier.salt", b"kvtier.space", b"kvtier.chunk"
_META = struct.Struct("<BxxxII32s")


class ChunkMeta(NamedTuple):
    """What a chunk's record says of itself: its place in the prefix and the key before it."""

    number: int
    chunk_tokens: int
    parent: bytes

    def pack(self) -> bytes:
        """The 44 bytes of a record's ``meta``: version u8, three zero bytes, number u32, chunk_tokens u32, parent."""
        return _META.pack(FORMAT_VERSION, self.number, self.chunk_tokens, self.parent)

    @classmethod
    def unpack(cls, meta: bytes) -> ChunkMeta | None:
        """Read a record's ``meta``; None for one that no chunk has."""
        if len(meta) != _META.size or meta[0] != FORMAT_VERSION:
            return None
        _, number, chunk_tokens, parent = _META.unpack(meta)
        return cls(number, chunk_tokens, parent)


def canonical_bytes(value: Identity) -> bytes:
    """Encode a value so that equal values, and only those, have equal bytes.

    A tag of one byte, then: nothing for None (``N``), false (``F``) and true (``T``); the length as u64 and the bytes
    for text in UTF-8 (``s``), bytes (``b``), integers in decimal (``i``) and floats as their IEEE 754 bits (``f``); the
    count as u64 and the items for sequences (``l``) and mappings (``m``, key before value, sorted by the key's UTF-8).
    All integers are little-endian.

    Raises
    ------
    InputError
        A value of another type, or a key that is no text.
    """
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"T" if value else b"F"
    if isinstance(value, int):
        return _counted(b"i", str(value).encode())
    if isinstance(value, float):
        return _counted(b"f", struct.pack("<d", value))
    if isinstance(value, str):
        return _counted(b"s", value.encode(errors="surrogatepass"))
    if isinstance(value, bytes):
        return _counted(b"b", value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InputError(f"keys of an identity must be text, got {sorted(map(repr, value))}")
        pairs = sorted((key.encode(errors="surrogatepass"), item) for key, item in value.items())
        items = [_counted(b"s", key) + canonical_bytes(item) for key, item in pairs]
        return b"m" + struct.pack("<Q", len(items)) + b"".join(items)
    if isinstance(value, Sequence):
        return b"l" + struct.pack("<Q", len(value)) + b"".join(canonical_bytes(item) for item in value)
    raise InputError(
        f"an identity is made of None, bool, int, float, str, bytes, sequences and mappings, got {type(value).__name__}"
    )


def namespace_digest(
    *, model: Identity, layout: KVLayout, salt: bytes, codec: str = "raw", extra: Identity = None
) -> bytes:
    """The 32 bytes that stand for a model, a layout, a codec, a tenant and whatever else sets KV caches apart.

    Parameters
    ----------
    model : Identity
        Fingerprint of weights, configuration, tokenizer, dtype and RoPE.
    layout : KVLayout
        Its shapes, types, windows, page and chunk; neither its query heads nor its block.
    salt : bytes
        The tenant's secret, of any length.
    extra : Identity
        Adapter, image digests, or anything else.
    """
    identity: Identity = {
        "version": FORMAT_VERSION,
        "codec": codec,
        "model": model,
        "extra": extra,
        "page_tokens": layout.page_tokens,
        "chunk_tokens": layout.chunk_tokens,
        "layers": [
            [layer.num_kv_heads, layer.key_dim, layer.value_dim, layer.dtype, layer.window] for layer in layout.layers
        ],
    }
    key = blake2b(salt, digest_size=_DIGEST_BYTES, person=_SALT_PERSON).digest()
    return blake2b(canonical_bytes(identity), digest_size=_DIGEST_BYTES, key=key, person=_SPACE_PERSON).digest()


def token_bytes(token_ids: TokenIds) -> bytes:
    """Token ids [T] as little-endian int64.

    Raises
    ------
    InputError
        Not one row of integers that fit int64.
    """
    try:
        ids = np.asarray(token_ids.cpu() if isinstance(token_ids, torch.Tensor) else token_ids)
    except (OverflowError, ValueError) as error:
        raise InputError(f"token ids must be one row of integers: {error}") from error
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise InputError(f"token ids must be one row of integers, got {ids.dtype} {list(ids.shape)}; give ids[0]")
    if ids.dtype == np.uint64 and ids.size and int(ids.max()) > np.iinfo(np.int64).max:
        raise InputError(f"token ids must fit int64, got {ids.max()}")
    return ids.astype("<i8").tobytes()


def chunk_keys(namespace: bytes, tokens: bytes, chunk_tokens: int) -> list[bytes]:
    """The keys of all full chunks of a prefix, given as `token_bytes`."""
    keys = []
    parent, size = namespace, 8 * chunk_tokens
    for at in range(0, len(tokens) - size + 1, size):
        chunk = blake2b(parent, digest_size=_DIGEST_BYTES, key=namespace, person=_CHUNK_PERSON)
        chunk.update(tokens[at : at + size])
        parent = chunk.digest()
        keys.append(parent)
    return keys


def _counted(tag: bytes, content: bytes) -> bytes:
    return tag + struct.pack("<Q", len(content)) + content
