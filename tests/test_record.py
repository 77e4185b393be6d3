"""The bytes on a medium: round trips, a golden file read by an independent reader, and a parser that nothing upsets."""

import struct
import tracemalloc
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError, RecordFormatError
from kvtier.record import (
    BLOCK_BYTES,
    MAX_HEADER_BYTES,
    MAX_META_BYTES,
    MAX_PAYLOAD_BYTES,
    Grave,
    RecordHeader,
    RecordKind,
    SegmentKind,
    Superblock,
    digest_extents,
    header_seed,
    pack_graves,
    parse_graves,
    parse_header,
    parse_superblock,
    peek_header_bytes,
)

GOLDEN = Path(__file__).parent / "golden" / "segment-v1.txt"
STORE = bytes(range(16))
EPOCH = 7
SEED = header_seed(STORE, EPOCH)
PAYLOAD = bytes(4090) + b"kvtier" + bytes(3) + b"!"

_FEW_BYTES = 1 << 20

numbers = st.integers(0, 2**64 - 1)
extents = st.sampled_from([4096, 12_288, 65_536, 1 << 20])


@st.composite
def headers(draw: st.DrawFn) -> RecordHeader:
    extent = draw(extents)
    payload = draw(st.integers(0, 40 * extent))
    digests = draw(st.binary(min_size=16, max_size=16)) * -(-payload // extent)
    return RecordHeader(
        key=draw(st.binary(min_size=32, max_size=32)),
        namespace=draw(st.binary(min_size=32, max_size=32)),
        payload_bytes=payload,
        sequence=draw(numbers),
        epoch=draw(numbers),
        digests=digests,
        tenant=draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=16)),
        meta=draw(st.binary(max_size=MAX_META_BYTES)),
        kind=draw(st.sampled_from(RecordKind)),
        codec=draw(st.integers(0, 2**32 - 1)),
        created_us=draw(numbers),
        extent_bytes=extent,
    )


def small_header(**changes: object) -> RecordHeader:
    fields: dict[str, object] = {
        "key": bytes(range(32)),
        "namespace": bytes(range(32, 64)),
        "payload_bytes": len(PAYLOAD),
        "sequence": 41,
        "epoch": EPOCH,
        "digests": digest_extents(PAYLOAD, 4096),
        "tenant": "équipe-a",
        "meta": b"layers 0-3",
        "codec": 5,
        "created_us": 1_700_000_000_000_000,
        "extent_bytes": 4096,
    }
    return RecordHeader(**(fields | changes))  # type: ignore[arg-type]


@given(header=headers(), seed=numbers)
def test_headers_come_back_as_they_went(header: RecordHeader, seed: int) -> None:
    packed = header.pack(seed)

    assert len(packed) == header.header_bytes == peek_header_bytes(packed)
    assert len(packed) % BLOCK_BYTES == 0
    assert parse_header(packed + b"payload", seed) == header
    assert parse_header(packed, seed).pack(seed) == packed


@given(kind=st.sampled_from(SegmentKind), epoch=numbers, store=st.binary(min_size=16, max_size=16), created=numbers)
def test_superblocks_come_back_as_they_went(kind: SegmentKind, epoch: int, store: bytes, created: int) -> None:
    block = Superblock(kind=kind, epoch=epoch, store=store, segment_bytes=1 << 30, created_us=created)

    assert parse_superblock(block.pack()) == block


@given(rows=st.lists(st.builds(Grave, st.binary(min_size=32, max_size=32), numbers)))
def test_graves_come_back_as_they_went(rows: list[Grave]) -> None:
    assert parse_graves(pack_graves(rows)) == rows


@given(header=headers(), data=st.data())
def test_no_flipped_bit_goes_unseen(header: RecordHeader, data: st.DataObject) -> None:
    packed = bytearray(header.pack(SEED))
    bit = data.draw(st.integers(0, 8 * len(packed) - 1), label="bit")
    packed[bit // 8] ^= 1 << bit % 8

    with pytest.raises(RecordFormatError):
        parse_header(packed, SEED)


@given(bit=st.integers(0, 8 * BLOCK_BYTES - 1))
def test_no_flipped_bit_of_a_superblock_goes_unseen(bit: int) -> None:
    packed = bytearray(golden_segment()[:BLOCK_BYTES])
    packed[bit // 8] ^= 1 << bit % 8

    with pytest.raises(RecordFormatError):
        parse_superblock(packed)


@pytest.mark.parametrize("seed", [header_seed(STORE, EPOCH + 1), header_seed(bytes(16), EPOCH), 0])
def test_headers_of_other_lives_and_stores_do_not_pass(seed: int) -> None:
    with pytest.raises(RecordFormatError, match="checksum"):
        parse_header(small_header().pack(SEED), seed)


@st.composite
def nearly_headers(draw: st.DrawFn) -> bytes:
    """Headers with fields of any value under a checksum that is right: what only the checks of lengths can refuse."""
    packed = bytearray(small_header().pack(SEED))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.sampled_from([16, 18, 20, 24, 48, 56, 60, 128, 132, 134, 136, 144]))
        packed[at : at + 4] = struct.pack("<I", draw(st.integers(0, 2**32 - 1) | st.integers(0, 70_000)))
    packed += bytes(draw(st.sampled_from([0, 4096, 8192])))
    size = min(len(packed), struct.unpack_from("<I", packed, 20)[0])
    struct.pack_into("<Q", packed, 8, xxhash.xxh3_64_intdigest(bytes(packed[16:size]), SEED))
    return bytes(packed)


@given(data=nearly_headers() | st.binary(max_size=9000) | st.binary(max_size=5000).map(lambda tail: b"KVTRECRD" + tail))
def test_no_bytes_crash_the_parser_or_cost_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        header = parse_header(data, SEED)
    except RecordFormatError:
        pass
    else:
        assert header.pack(SEED)[: len(data)] == data[: header.header_bytes], "accepted, but means something else"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < _FEW_BYTES
    assert (peek_header_bytes(data) or 0) <= MAX_HEADER_BYTES


@given(data=st.binary(max_size=5000) | st.binary(max_size=4200).map(lambda tail: b"KVTSEGMT" + tail))
def test_no_bytes_crash_the_parser_of_superblocks(data: bytes) -> None:
    with pytest.raises(RecordFormatError):
        parse_superblock(data)


@pytest.mark.parametrize("version", [0, 2])
def test_unknown_versions_are_refused(version: int) -> None:
    packed = bytearray(small_header().pack(SEED))
    struct.pack_into("<H", packed, 16, version)
    struct.pack_into("<Q", packed, 8, xxhash.xxh3_64_intdigest(bytes(packed[16:]), SEED))

    with pytest.raises(RecordFormatError, match=f"required version 1, got {version}"):
        parse_header(packed, SEED)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": b"short"},
        {"namespace": bytes(33)},
        {"digests": b""},
        {"tenant": ""},
        {"tenant": "x" * 65},
        {"meta": bytes(MAX_META_BYTES + 1)},
        {"payload_bytes": MAX_PAYLOAD_BYTES + 1, "digests": bytes(16 << 20), "extent_bytes": 4096},
        {"extent_bytes": 5000, "digests": bytes(16)},
        {"extent_bytes": 32 << 20, "digests": bytes(16)},
    ],
)
def test_what_the_format_cannot_say_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="must"):
        small_header(**wrong).pack(SEED)


def test_a_tombstone_has_whole_rows() -> None:
    with pytest.raises(RecordFormatError, match="rows of 40 bytes"):
        parse_graves(bytes(41))


def test_the_golden_file_is_what_is_written_today() -> None:
    assert golden_segment() == read_golden()


def test_an_independent_reader_reads_the_golden_file() -> None:
    """The reader below knows `docs/format.md` and nothing else."""
    superblock, records = independent_reader(read_golden())

    assert superblock == {"kind": 1, "epoch": EPOCH, "store": STORE, "size": 1 << 20, "created": 1_600_000_000_000_000}
    assert [record["kind"] for record in records] == [1, 2]
    assert records[0] == {
        "kind": 1,
        "sequence": 41,
        "created": 1_700_000_000_000_000,
        "key": bytes(range(32)),
        "namespace": bytes(range(32, 64)),
        "codec": 5,
        "tenant": "équipe-a",
        "meta": b"layers 0-3",
        "payload": PAYLOAD,
    }
    assert records[1]["payload"] == bytes(range(32)) + struct.pack("<Q", 42)


def golden_segment() -> bytes:
    """The start of a segment: superblock, a gap, a record, a record of another life, a tombstone."""
    superblock = Superblock(
        kind=SegmentKind.CACHE, epoch=EPOCH, store=STORE, segment_bytes=1 << 20, created_us=1_600_000_000_000_000
    )
    graves = pack_graves([Grave(bytes(range(32)), 42)])
    tombstone = small_header(
        kind=RecordKind.TOMBSTONE,
        key=bytes(32),
        namespace=bytes(32),
        payload_bytes=len(graves),
        digests=digest_extents(graves, 65_536),
        extent_bytes=65_536,
        sequence=43,
        tenant="default",
        meta=b"",
        codec=0,
    )
    stale = small_header(epoch=EPOCH - 1, payload_bytes=0, digests=b"").pack(header_seed(STORE, EPOCH - 1))
    parts = [superblock.pack(), b"gap", small_header().pack(SEED), PAYLOAD, stale, tombstone.pack(SEED), graves]
    return b"".join(part + bytes(-len(part) % BLOCK_BYTES) for part in parts)


def read_golden() -> bytes:
    """Lines of an offset and 32 bytes in hexadecimal; what is left out is zero."""
    segment = bytearray()
    for line in GOLDEN.read_text(encoding="ascii").splitlines():
        offset, _, digits = line.partition(": ")
        segment += bytes(int(offset, 16) - len(segment)) + bytes.fromhex(digits)
    return bytes(segment + bytes(-len(segment) % BLOCK_BYTES))


def write_golden(segment: bytes) -> None:
    """Write the golden file: for a new version of the format, never for an old one."""
    chunks = ((at, segment[at : at + 32]) for at in range(0, len(segment), 32))
    lines = [f"{at:08x}: {chunk.hex()}\n" for at, chunk in chunks if any(chunk)]
    GOLDEN.write_text("".join(lines), encoding="ascii")


def independent_reader(segment: bytes) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Read a segment by the document alone."""
    assert segment[:8] == b"KVTSEGMT"
    assert struct.unpack_from("<Q", segment, 8)[0] == xxhash.xxh3_64_intdigest(segment[16:4096])
    version, kind, _, epoch = struct.unpack_from("<HHIQ", segment, 16)
    size, created = struct.unpack_from("<QQ", segment, 48)
    assert version == 1
    store = segment[32:48]
    superblock = {"kind": kind, "epoch": epoch, "store": store, "size": size, "created": created}
    seed = xxhash.xxh3_64_intdigest(store + struct.pack("<Q", epoch))
    records = []
    at = 4096
    while at + 4096 <= len(segment):
        record, length = independent_record(segment[at:], epoch, seed)
        if record:
            records.append(record)
        at += length
    return superblock, records


def independent_record(data: bytes, epoch: int, seed: int) -> tuple[dict[str, object], int]:
    """A record and its length, or nothing and one block."""
    nothing: tuple[dict[str, object], int] = ({}, 4096)
    if data[:8] != b"KVTRECRD":
        return nothing
    checksum, version, kind, header, its_epoch, sequence, created = struct.unpack_from("<QHHIQQQ", data, 8)
    payload, extent, count = struct.unpack_from("<QII", data, 48)
    codec, tenant, meta = struct.unpack_from("<IHH", data, 128)
    if version != 1 or its_epoch != epoch or xxhash.xxh3_64_intdigest(data[16:header], seed) != checksum:
        return nothing
    body = data[header : header + payload]
    digests_at = 144 + tenant + meta
    for number in range(count):
        digest = xxhash.xxh3_128_digest(body[number * extent : (number + 1) * extent])
        if data[digests_at + 16 * number :][:16] != digest:
            return nothing
    record = {
        "kind": kind,
        "sequence": sequence,
        "created": created,
        "key": data[64:96],
        "namespace": data[96:128],
        "codec": codec,
        "tenant": data[144 : 144 + tenant].decode(),
        "meta": data[144 + tenant : digests_at],
        "payload": body,
    }
    return record, header + -(-payload // 4096) * 4096
