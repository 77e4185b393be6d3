"""vLLM's file tier: one file a block, temporary file and rename, no sync, no checksum.

The wheel's C extension for this links CUDA libraries and does not load without them: what is timed is the Python code
of the same file, in as many threads as asked for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def _io() -> Any:
    """The file as unpacked from the wheel, without the packages above it."""
    path = Path(os.environ["UNPACKED"]) / "vllm/v1/kv_offload/tiering/fs/io.py"
    spec = importlib.util.spec_from_file_location("vllm_fs_io", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Store:
    """Its batch functions, a part for each thread; ``durable`` adds one syncfs a call."""

    def __init__(
        self, directory: Path, *, piece_bytes: int, pieces: int, direct: bool, durable: bool, workers: int = 4
    ) -> None:
        del pieces
        self.note = f"{workers} threads of Python" + (", and a syncfs a call by the benchmark" if durable else "")
        self._io = _io()
        self._root = directory
        self._size, self._direct, self._workers = piece_bytes, direct, workers
        self._pool = ThreadPoolExecutor(workers)
        self._directory = os.open(directory, os.O_RDONLY) if durable else None

    def batch(self, names: Sequence[str], buffers: Sequence[Any]) -> Any:
        """Paths and views, a part for each thread."""
        pairs = [
            (str(self._root / name[-2:] / name), memoryview(buffer))
            for name, buffer in zip(names, buffers, strict=True)
        ]
        share = -(-len(pairs) // self._workers)
        return [pairs[at : at + share] for at in range(0, len(pairs), share)]

    def put(self, batch: Any) -> None:
        """Store every part."""

        def store(part: Any) -> None:
            for path, view in part:
                self._io.batch_store_block([path], view, [0], self._size, self._direct)

        list(self._pool.map(store, batch))
        if self._directory is not None and ctypes.CDLL(None, use_errno=True).syncfs(self._directory):
            raise OSError(ctypes.get_errno(), "syncfs")

    def get(self, batch: Any) -> list[bool]:
        """Load every part; what raises is a miss."""

        def load(part: Any) -> list[bool]:
            return [self._loaded(path, view) for path, view in part]

        return [ok for part in self._pool.map(load, batch) for ok in part]

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()
        if self._directory is not None:
            os.close(self._directory)

    def _loaded(self, path: str, view: memoryview) -> bool:
        try:
            self._io.batch_load_block([path], view, [0], self._size, self._direct)
        except OSError:
            return False
        return True
