"""One read: open the files, learn from their headers what they hold, fetch and verify, put aside what is wrong."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtier.errors import CapacityError, RecordFormatError
from kvtier.record import BLOCK_BYTES, RecordHeader, header_seed, parse_header, peek_header_bytes
from kvtier.storage_backends.engines import EngineFile, IOEngine, Transfer
from kvtier.storage_backends.extents import ranges_within
from kvtier.storage_backends.files.putting import STORE
from kvtier.storage_backends.files.shelf import Shelf
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.records import ByteRange, ReadRequest, RecordInfo
from kvtier.storage_backends.segment.headers import HeaderCache
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.reader import Fetch, Found, read_fetches

__all__ = ["Reader"]

_NOTHING = torch.empty(0, dtype=torch.uint8)
_SEED = header_seed(STORE, 0)

_GONE = frozenset({errno.ENOENT, errno.ESTALE})
"""The file was removed, which is anybody's right."""

_PASSING = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.ETIMEDOUT, errno.EACCES})
"""Says nothing about the bytes: the file stays where it is."""


@dataclass(slots=True)
class _Opened:
    """A file that is being read; ``found`` is None until something is known of it."""

    key: bytes
    file: EngineFile
    inode: int
    segment: Segment
    header: RecordHeader | None = None
    found: Found | None = None
    error: OSError | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """Key of its header in the cache."""
        return (self.segment.number, 0, 0)


class Reader:
    """Reads records of a shelf; any number of threads.

    Parameters
    ----------
    changing : bool
        Put damaged files aside and tell others what was used; if not, nothing is changed on the medium.
    """

    def __init__(self, shelf: Shelf, engine: IOEngine, *, changing: bool) -> None:
        self._shelf = shelf
        self._engine = engine
        self._changing = changing
        self._headers = HeaderCache()

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Fill the requests that can be filled."""
        opened = self._open([request.key for request in requests])
        try:
            self._learn(list(opened.values()))
            fetches = [self._fetch(opened.get(request.key), request) for request in requests]
            self._run([fetch for fetch in fetches if fetch is not None])
        finally:
            for one in opened.values():
                one.file.close()
        served = []
        for request, fetch in zip(requests, fetches, strict=True):
            outcome = None if fetch is None else fetch.outcome()
            served.append(outcome is Found.RIGHT)
            if fetch is not None and outcome is not Found.RIGHT:
                opened[request.key].found = outcome
                opened[request.key].error = fetch.error
        self._put_aside(list(opened.values()))
        self._count(requests, served)
        return served

    def verify(self, keys: Sequence[bytes]) -> dict[bytes, Found]:
        """Read whole records, headers from the medium too; of files that went, nothing."""
        opened = self._open(keys)
        try:
            for one in opened.values():
                self._headers.forget(one.place)
            self._learn(list(opened.values()))
            fetches = [
                self._fetch(one, ReadRequest(one.key, empty_aligned(one.header.payload_bytes)))
                for one in opened.values()
                if one.header is not None
            ]
            self._run([fetch for fetch in fetches if fetch is not None])
        finally:
            for one in opened.values():
                one.file.close()
        for fetch in fetches:
            if fetch is not None and (outcome := fetch.outcome()) is not Found.RIGHT:
                opened[fetch.key].found, opened[fetch.key].error = outcome, fetch.error
        self._put_aside(list(opened.values()))
        return {key: one.found or Found.RIGHT for key, one in opened.items()}

    def infos(self, keys: Sequence[bytes]) -> list[RecordInfo]:
        """What the headers say; of files that went or are damaged, nothing."""
        opened = self._open(keys)
        try:
            self._learn(list(opened.values()))
        finally:
            for one in opened.values():
                one.file.close()
        self._put_aside(list(opened.values()))
        infos = []
        with self._shelf.lock:
            for key in keys:
                header = opened[key].header if key in opened else None
                if header is not None:
                    entry = self._shelf.table.get(key)
                    if entry is not None:
                        entry.tenant = header.tenant
                    infos.append(_info(header, 0 if entry is None else entry.hits))
        return infos

    def _open(self, keys: Sequence[bytes]) -> dict[bytes, _Opened]:
        """The files that are there."""
        opened: dict[bytes, _Opened] = {}
        for key in dict.fromkeys(keys):
            losses = self._shelf.losses
            try:
                file = self._engine.open(self._shelf.path(key), writable=False)
                stat = self._shelf.path(key).stat()
            except OSError as error:
                if error.errno in _GONE:
                    self._shelf.forget(key)
                else:
                    self._fail()
                continue
            self._shelf.note(key, stat, losses)
            segment = Segment((stat.st_mtime_ns << 64) | stat.st_ino, file, stat.st_size)
            opened[key] = _Opened(key, file, stat.st_ino, segment)
        return opened

    def _learn(self, opened: Sequence[_Opened]) -> None:
        """Read the headers that are not known."""
        unknown = []
        for one, known in zip(opened, self._headers.find([one.place for one in opened]), strict=True):
            one.header = known
            if known is None:
                unknown.append(one)
        blocks = _memory(len(unknown) * BLOCK_BYTES)
        if blocks is None:
            for one in unknown:
                one.found, one.error = Found.FAILED, OSError(errno.ENOMEM, "no memory for headers")
            return
        heads = [blocks[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(len(unknown))]
        transfers = [Transfer(one.file, 0, head) for one, head in zip(unknown, heads, strict=True)]
        for one, head, error in zip(unknown, heads, self._engine.read(transfers), strict=True):
            if error is not None:
                _judge(one, error, BLOCK_BYTES)
                continue
            try:
                one.header = self._parse(one, head)
                self._headers.add([(one.place, one.header)])
            except RecordFormatError:
                one.found = Found.DAMAGED
            except OSError as failure:
                _judge(one, failure, BLOCK_BYTES)

    def _parse(self, one: _Opened, head: torch.Tensor) -> RecordHeader:
        """The header that begins with a block; the rest of a long one is read."""
        size = peek_header_bytes(head.numpy().data)
        if size is not None and size > BLOCK_BYTES:
            if size > one.segment.size:
                raise RecordFormatError(f"a header of {size} bytes in a file of {one.segment.size}")
            head = empty_aligned(size)
            (error,) = self._engine.read([Transfer(one.file, 0, head)])
            if error is not None:
                raise error
        header = parse_header(head.numpy().data, _SEED)
        if header.key != one.key:
            raise RecordFormatError("the file holds another record")
        if header.record_bytes > one.segment.size:
            raise RecordFormatError(f"the record has {header.record_bytes} bytes, the file {one.segment.size}")
        return header

    def _fetch(self, one: _Opened | None, request: ReadRequest) -> Fetch | None:
        """The fetch of a request; None when there is nothing to fetch."""
        if one is None or one.header is None:
            return None
        header = one.header
        ranges: tuple[ByteRange, ...] | None = ranges_within(request, header.payload_bytes)
        if ranges is None:
            return None
        return Fetch(
            key=request.key,
            sequence=header.sequence,
            segment=one.segment,
            epoch=0,
            offset=0,
            header_bytes=header.header_bytes,
            payload_bytes=header.payload_bytes,
            extent_bytes=header.extent_bytes,
            ranges=ranges,
            into=request.into,
        )

    def _run(self, fetches: Sequence[Fetch]) -> None:
        try:
            read_fetches(self._engine, fetches, self._headers, STORE, 0)
        except CapacityError as error:
            for fetch in fetches:
                fetch.error = OSError(errno.ENOMEM, str(error))

    def _put_aside(self, opened: Sequence[_Opened]) -> None:
        """Judge what is not right: damaged files go into quarantine, so do those that the medium does not give."""
        for one in opened:
            if one.found is None:
                continue
            if one.found is Found.DAMAGED:
                with self._shelf.lock:
                    self._shelf.counters.damaged += 1
            else:
                self._fail()
            passing = one.error is not None and one.error.errno in _PASSING
            self._headers.forget(one.place)
            if self._changing and not passing:
                self._shelf.quarantine(one.key, one.inode)
            else:
                self._shelf.forget(one.key)

    def _count(self, requests: Sequence[ReadRequest], served: Sequence[bool]) -> None:
        due = []
        with self._shelf.lock:
            counters = self._shelf.counters
            counters.hits += sum(served)
            counters.misses += len(served) - sum(served)
            for request, right in zip(requests, served, strict=True):
                if right:
                    counters.read_bytes += request.into.numel()
                    if self._shelf.table.use(request.key):
                        due.append(request.key)
        if self._changing:
            for key in due:
                self._shelf.touch(key)

    def _fail(self) -> None:
        with self._shelf.lock:
            self._shelf.counters.failed += 1


def _judge(one: _Opened, error: OSError, needed: int) -> None:
    """A file that is too short is damaged; otherwise it was the medium."""
    one.error = error
    one.found = Found.DAMAGED if one.segment.size < needed else Found.FAILED


def _memory(size: int) -> torch.Tensor | None:
    try:
        return empty_aligned(size) if size else _NOTHING
    except CapacityError:
        return None


def _info(header: RecordHeader, hits: int) -> RecordInfo:
    return RecordInfo(
        key=header.key,
        namespace=header.namespace,
        tenant=header.tenant,
        payload_bytes=header.payload_bytes,
        meta=header.meta,
        sequence=header.sequence,
        created=header.created_us / 1e6,
        hits=hits,
    )
