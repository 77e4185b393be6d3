"""Faults do what they say: around an I/O engine, and to files at rest."""

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvtier.storage_backends.engines import IOEngine, PosixEngine, Transfer
from kvtier.testing.faults import FaultyEngine, ReadFault, WriteFault, damage_files, flip_bit, swap_pages
from kvtier.testing.faults.files import WAYS, files_below

SIZE = 4 * 8192


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine(PosixEngine(threads=2)) as engine:
        yield engine


def batch(engine: IOEngine, path: Path, rows: torch.Tensor) -> list[Transfer]:
    file = engine.open(path, writable=True, create=True)
    if file.size < SIZE:
        file.allocate(SIZE)
    return [Transfer(file, at * 8192, row) for at, row in enumerate(rows)]


def stored(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(4, 8192)


def rows(fill: int) -> torch.Tensor:
    return torch.full((4, 8192), fill, dtype=torch.uint8)


@pytest.mark.parametrize("fault", WriteFault)
def test_a_faulty_write_hits_its_own_transfer(engine: FaultyEngine, tmp_path: Path, fault: WriteFault) -> None:
    path = tmp_path / "file"
    transfers = batch(engine, path, rows(1))
    assert engine.write(transfers) == [None] * 4
    engine.on_write(fault, nth=3)
    filled = []

    results = engine.write([one._replace(buffer=rows(2)[0]) for one in transfers], filled.append)

    assert sorted(filled) == [0, 1, 2, 3]
    codes = [error.errno if error else 0 for error in results]
    assert codes == [0, 0, errno.EIO if fault is WriteFault.ERROR else 0, 0]
    after = stored(path)
    assert bool((after[:2] == 2).all())
    match fault:
        case WriteFault.LOST:
            assert bool((after[2] == 1).all())
        case WriteFault.TORN | WriteFault.ERROR:
            assert bool((after[2, :4096] == 2).all())
            assert bool((after[2, 4096:] == 1).all())
        case WriteFault.MISPLACED:
            assert bool((after[2, :4096] == 1).all())
    transfers[0].file.close()


@pytest.mark.parametrize("fault", ReadFault)
def test_a_faulty_read_hits_its_own_transfer(engine: FaultyEngine, tmp_path: Path, fault: ReadFault) -> None:
    path = tmp_path / "file"
    transfers = batch(engine, path, rows(1))
    engine.write(transfers)
    into = rows(7)
    engine.on_read(fault, nth=2)
    sums: dict[int, int] = {}

    results = engine.read(
        [one._replace(buffer=row) for one, row in zip(transfers, into, strict=True)],
        lambda at: sums.__setitem__(at, int(into[at].sum())),
    )

    failed = fault is ReadFault.ERROR
    assert [error.errno if error else 0 for error in results] == [0, errno.EIO if failed else 0, 0, 0]
    assert sums[0] == sums[2] == sums[3] == 8192
    assert (1 not in sums) if failed else (sums[1] != 8192)
    assert bool((into[1] == 7).all()) == (fault in {ReadFault.ERROR, ReadFault.STALE})
    assert int((into[1] != 1).sum()) == {ReadFault.FLIP: 1, ReadFault.SHORT: 4096}.get(fault, 8192)
    assert engine.read([one._replace(buffer=row) for one, row in zip(transfers, into, strict=True)]) == [None] * 4
    assert bool((into == 1).all()), "a fault happens once"
    transfers[0].file.close()


def test_a_full_disk_takes_what_it_has_room_for(engine: FaultyEngine, tmp_path: Path) -> None:
    first = batch(engine, tmp_path / "first", rows(1))[0].file
    engine.fill_disk(after_bytes=SIZE + 100)
    second = engine.open(tmp_path / "second", writable=True, create=True)
    second.allocate(SIZE)
    with pytest.raises(OSError, match="No space"):
        first.allocate(2 * SIZE)
    (error,) = engine.write([Transfer(second, SIZE, rows(1)[0])])
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert engine.write([Transfer(second, 0, rows(1)[0])]) == [None], "space that was taken can be written"
    engine.repair()
    first.allocate(2 * SIZE)
    first.close()
    second.close()


def test_a_broken_disk_and_failing_syncs(engine: FaultyEngine, tmp_path: Path) -> None:
    transfers = batch(engine, tmp_path / "file", rows(1))
    file = transfers[0].file
    engine.fail_syncs(1)
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    file.sync()
    engine.break_disk()
    for results in (engine.write(transfers), engine.read(transfers)):
        assert [error.errno if error else 0 for error in results] == [errno.EIO] * 4
    for call in (file.sync, lambda: file.allocate(2 * SIZE), lambda: engine.open(tmp_path / "file", writable=True)):
        with pytest.raises(OSError, match="Input/output"):
            call()
    engine.repair()
    assert engine.write(transfers) == [None] * 4
    file.close()


def test_bits_and_pages_of_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096) + b"\1" * 4096)
    flip_bit(path, 8 * 4096 + 3)
    assert path.read_bytes()[4096] == 1 ^ 8
    swap_pages(path, 0, 1)
    assert path.read_bytes() == bytes([9]) + b"\1" * 4095 + bytes(4096)


@pytest.mark.parametrize("way", list(dict.fromkeys(WAYS)), ids=lambda way: way.__name__.strip("_"))
def test_every_way_of_damage_changes_its_file_only(tmp_path: Path, way: Callable[[Path, random.Random], str]) -> None:
    for seed in range(20):
        paths = [tmp_path / name for name in ("one", "two-shm", "other")]
        before = [random.Random(at).randbytes(5 * 4096 + 17) for at in range(3)]
        for path, data in zip(paths, before, strict=True):
            path.write_bytes(data)
        assert files_below(tmp_path) == [paths[0], paths[2]]
        words = way(paths[0], random.Random(seed))
        assert words
        assert paths[0].read_bytes() != before[0], words
        assert [path.read_bytes() for path in paths[1:]] == before[1:]


def test_most_damage_is_aimed_at_bytes_that_matter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(60 * 4096) + b"\7" * 4096 * 4
    hits = 0
    for seed in range(60):
        path.write_bytes(content)
        damage_files(tmp_path, random.Random(seed))
        after = path.read_bytes()
        hits += after[60 * 4096 : 64 * 4096] != content[60 * 4096 :]
    assert hits > 30
