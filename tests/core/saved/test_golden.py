"""A kept file of version 1: read by a reader that knows `docs/format.md` alone, restored by whatever comes later."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kvtier.core.memory import Memory
from kvtier.core.session import Session
from kvtier.testing.steps import open_memory
from kvtier.types import KVLayout, LayerLayout

GOLDEN = Path(__file__).parents[2] / "golden" / "session-v1.txt"
TOKENS = 11
DIM = 3


def shape_of(window: int | None) -> LayerLayout:
    return LayerLayout(num_query_heads=1, num_kv_heads=1, key_dim=DIM, value_dim=DIM, dtype="float32", window=window)


LAYOUT = KVLayout(layers=(shape_of(None), shape_of(4)), page_tokens=4, block_tokens=8, chunk_tokens=8)


def numbers(layer: int, tokens: int = TOKENS) -> torch.Tensor:
    """Keys of a layer [1, 1, n, D], the same in every process; values are their negatives."""
    return (torch.arange(tokens * DIM, dtype=torch.float32) / 8 + layer).view(1, 1, tokens, DIM)


def open_small() -> Memory:
    return open_memory(LAYOUT)


def fill(session: Session) -> None:
    positions = torch.arange(TOKENS)[None]
    for layer, shape in enumerate(LAYOUT.layers):
        keys = numbers(layer)
        session.append(layer, keys, -keys, positions)
        session.attend(layer, keys, positions, scale=0.1, window=shape.window)


def read_golden() -> bytes:
    """Lines of an offset and 32 bytes in hexadecimal; what is left out is zero."""
    data = bytearray()
    for line in GOLDEN.read_text(encoding="ascii").splitlines():
        offset, _, digits = line.partition(": ")
        data += bytes(int(offset, 16) - len(data)) + bytes.fromhex(digits)
    return bytes(data + bytes(-len(data) % 4096))


def write_golden(data: bytes) -> None:
    """Write the golden file: for a new version of the format, never for an old one."""
    chunks = ((at, data[at : at + 32]) for at in range(0, len(data), 32))
    GOLDEN.write_text("".join(f"{at:08x}: {chunk.hex()}\n" for at, chunk in chunks if any(chunk)), encoding="ascii")


def test_the_golden_file_is_what_is_written_today(tmp_path: Path) -> None:
    with closing(open_small()) as memory, memory.session() as session:
        fill(session)
        session.save(tmp_path / "session.kvs", model="golden", attached={"ids": torch.arange(TOKENS)[None]})

    assert said((tmp_path / "session.kvs").read_bytes()) == said(read_golden())


def test_the_golden_file_is_restored(tmp_path: Path) -> None:
    (tmp_path / "session.kvs").write_bytes(read_golden())
    with closing(open_small()) as one, closing(open_small()) as other:
        restored, lived = one.session(), other.session()
        attached = restored.load(tmp_path / "session.kvs", model="golden")
        fill(lived)

        assert torch.equal(attached["ids"], torch.arange(TOKENS)[None])
        for layer, shape in enumerate(LAYOUT.layers):
            positions, keys = torch.tensor([[TOKENS]]), numbers(layer, 1)
            outs = []
            for session in (restored, lived):
                session.append(layer, keys, -keys, positions)
                outs.append(session.attend(layer, keys, positions, scale=0.1, window=shape.window))
            assert torch.equal(*outs)


def test_an_independent_reader_reads_the_golden_file() -> None:
    """The reader below knows `docs/format.md` and nothing else."""
    description, array = independent_reader(read_golden())

    assert description["columns"] == TOKENS
    assert description["identity"]["model"] == "golden"
    assert description["history"] == [[TOKENS, None]]
    full, sliding = description["rows"][0]
    keys, values = numbers(0)[0, 0].numpy(), -numbers(0)[0, 0].numpy()
    pages = array(full["pages"]).reshape(2, 1, 2, 4, DIM)
    assert np.array_equal(np.concatenate([*pages[:, 0, 0], array(full["tail_keys"])[0]]), keys)
    assert np.array_equal(np.concatenate([*pages[:, 0, 1], array(full["tail_values"])[0]]), values)
    assert array(full["positions"]).tolist() == [list(range(TOKENS))]
    assert array(sliding["positions"]).tolist() == [8, 9, 10]
    assert np.array_equal(array(sliding["keys"])[0, -3:], numbers(1)[0, 0, -3:].numpy())
    assert array(description["attached"]["ids"]).tolist() == [list(range(TOKENS))]


def said(data: bytes) -> Any:
    """All that a file says, but for where pages lay in memory."""
    description, array = independent_reader(data)

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "at" in value:
            return array(value).tolist()
        return {name: plain(item) for name, item in value.items() if name not in ("groups", "frames")}

    return plain(description)


def independent_reader(data: bytes) -> tuple[Any, Callable[[Any], npt.NDArray[Any]]]:
    """Read a file by the document alone: the description, and what gives its arrays."""
    assert data[:8] == b"KVTSESSN"
    assert struct.unpack_from("<Q", data, 8)[0] == xxhash.xxh3_64_intdigest(data[16:4096])
    version, zero, extent, _, payload, described = struct.unpack_from("<HHIQQQ", data, 16)
    assert (version, zero, data[80:4096]) == (1, 0, bytes(4016))
    digests_at = 4096 + payload
    described_at = digests_at + -(-(-(-payload // extent) * 16) // 4096) * 4096
    digests, text = data[digests_at:described_at], data[described_at:]
    assert len(text) == described
    assert data[48:64] == xxhash.xxh3_128_digest(digests)
    assert data[64:80] == xxhash.xxh3_128_digest(text)
    for number, at in enumerate(range(0, payload, extent)):
        held = data[4096 + at : 4096 + min(at + extent, payload)]
        assert digests[number * 16 : number * 16 + 16] == xxhash.xxh3_128_digest(held)

    def array(said: Any) -> npt.NDArray[Any]:
        count = int(np.prod(said["shape"]))
        return np.frombuffer(data, dtype=said["dtype"], count=count, offset=4096 + said["at"]).reshape(said["shape"])

    return json.loads(text), array
