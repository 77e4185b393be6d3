"""Damage to files at rest, behind the back of whoever wrote them: any bit of any file, SQLite's included."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from kvtier.storage_backends.memory import PAGE_BYTES

__all__ = ["WAYS", "damage_files", "files_below", "flip_bit", "swap_pages", "truncate_file"]

_Way: TypeAlias = Callable[[Path, random.Random], str]


def files_below(directory: Path) -> list[Path]:
    """Regular files with bytes in them, sorted.

    SQLite's ``-shm`` files are left out: they are shared memory, not storage, and damage to them is damage to a running
    process.
    """
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.stat().st_size and not path.name.endswith("-shm")
    )


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit of a file, counted from its first byte."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def truncate_file(path: Path, keep: int) -> None:
    """Lose the bytes of a file from ``keep`` on."""
    os.truncate(path, keep)


def swap_pages(path: Path, one: int, other: int, page_bytes: int = PAGE_BYTES) -> None:
    """Exchange two pages of a file, as a disk does that writes to the wrong place."""
    with path.open("r+b") as file:
        held = []
        for page in (one, other):
            file.seek(page * page_bytes)
            held.append(file.read(page_bytes))
        for page, data in zip((other, one), held, strict=True):
            file.seek(page * page_bytes)
            file.write(data)


def damage_files(directory: Path, rng: random.Random) -> str:
    """Damage one file below a directory in one of the `WAYS`; says what was done, and to what.

    Most damage is aimed at pages that are not all zeros: preallocated space is large, and nothing is lost there.
    """
    paths = files_below(directory)
    if not paths:
        return "there was no file to damage"
    path = rng.choice(paths)
    return f"{path.name}: {rng.choice(WAYS)(path, rng)}"


def _flip_one(path: Path, rng: random.Random) -> str:
    bit = _used_page(path, rng) * PAGE_BYTES * 8 + rng.randrange(PAGE_BYTES * 8)
    bit %= path.stat().st_size * 8
    flip_bit(path, bit)
    return f"bit {bit} flipped"


def _flip_many(path: Path, rng: random.Random) -> str:
    return ", ".join(_flip_one(path, rng) for _ in range(rng.randint(2, 40)))


def _zero_page(path: Path, rng: random.Random) -> str:
    return _overwrite(path, _used_page(path, rng), b"\0" * PAGE_BYTES, "zeroed")


def _garbage_page(path: Path, rng: random.Random) -> str:
    return _overwrite(path, _used_page(path, rng), rng.randbytes(PAGE_BYTES), "overwritten with noise")


def _swap(path: Path, rng: random.Random) -> str:
    one, other = _used_page(path, rng), _used_page(path, rng)
    size = path.stat().st_size
    if one == other or max(one, other) * PAGE_BYTES + PAGE_BYTES > size:
        return _flip_one(path, rng)
    swap_pages(path, one, other)
    return f"pages {one} and {other} exchanged"


def _copy(path: Path, rng: random.Random) -> str:
    source, target = _used_page(path, rng), _used_page(path, rng)
    if source == target:
        return _flip_one(path, rng)
    with path.open("rb") as file:
        file.seek(source * PAGE_BYTES)
        data = file.read(PAGE_BYTES)
    return _overwrite(path, target, data, f"overwritten with page {source}")


def _truncate(path: Path, rng: random.Random) -> str:
    keep = min(path.stat().st_size - 1, _used_page(path, rng) * PAGE_BYTES + rng.choice([0, 1, 100, PAGE_BYTES]))
    truncate_file(path, keep)
    return f"truncated to {keep} bytes"


def _grow(path: Path, rng: random.Random) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100, 5000])))
    return "noise appended"


WAYS: tuple[_Way, ...] = (
    _flip_one,
    _flip_one,
    _flip_many,
    _zero_page,
    _garbage_page,
    _swap,
    _copy,
    _truncate,
    _grow,
)
"""What can happen to a file: ``(path, random) -> words``; one flipped bit twice as often as the others."""


def _overwrite(path: Path, page: int, data: bytes, words: str) -> str:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(page * PAGE_BYTES)
        file.write(data[: max(1, size - page * PAGE_BYTES)])
    return f"page {page} {words}"


def _used_page(path: Path, rng: random.Random) -> int:
    """A page of the file, most often one that is not all zeros."""
    pages = -(-path.stat().st_size // PAGE_BYTES)
    page = rng.randrange(pages)
    if rng.random() < 0.1:
        return page
    with path.open("rb") as file:
        for _ in range(64):
            file.seek(page * PAGE_BYTES)
            if any(file.read(PAGE_BYTES)):
                break
            page = rng.randrange(pages)
    return page
