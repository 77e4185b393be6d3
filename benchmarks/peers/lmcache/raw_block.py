"""LMCache's raw block backend: fixed slots in one file, I/O in Rust, an index that is saved once a minute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.storage_backend.raw_block import RawBlockCore, RawBlockCoreConfig, encode_object_key

_BLOCK: Final = 4096
_INDEX_BYTES: Final = 32 << 20


class Store:
    """Its core, called by several threads as by its adapter; ``durable`` adds its checkpoint and a fdatasync."""

    def __init__(
        self,
        directory: Path,
        *,
        piece_bytes: int,
        pieces: int,
        direct: bool,
        durable: bool,
        engine: str = "posix",
        workers: int = 4,
    ) -> None:
        slot = piece_bytes + _BLOCK
        path = directory / "raw_block"
        size = _INDEX_BYTES + slot * pieces
        with path.open("ab") as file:
            if file.tell() == 0:
                os.posix_fallocate(file.fileno(), 0, size)
        self.note = f"{workers} workers" + (", its checkpoint and a fdatasync a call" if durable else "")
        self._core = RawBlockCore(_config(path, size, slot, direct=direct, engine=engine), key_namespace="object")
        self._pool = ThreadPoolExecutor(workers)
        self._workers = workers
        self._file = os.open(path, os.O_RDWR) if durable else None

    def batch(self, names: Sequence[str], buffers: Sequence[Any]) -> Any:
        """A part for each worker: keys, which are encoded inside the timing as by its adapter, and memory objects."""
        keys = [ObjectKey(sha256(name.encode()).digest(), "model", 0) for name in names]
        objects = [_memory(buffer) for buffer in buffers]
        share = -(-len(keys) // self._workers)
        return [(keys[at : at + share], objects[at : at + share]) for at in range(0, len(keys), share)]

    def put(self, batch: Any) -> None:
        """Store every part."""

        def store(part: Any) -> Any:
            keys, objects = part
            return self._core.put_many([encode_object_key(key) for key in keys], objects)

        for result in self._pool.map(store, batch):
            if not all(result.results):
                raise RuntimeError("raw_block refused a piece")
        if self._file is not None:
            self._core.checkpoint_now()
            os.fdatasync(self._file)

    def get(self, batch: Any) -> list[bool]:
        """Load every part."""

        def load(part: Any) -> list[bool]:
            keys, objects = part
            return self._core.load_many_into([encode_object_key(key).encoded for key in keys], objects)

        return [ok for part in self._pool.map(load, batch) for ok in part]

    def close(self) -> None:
        """Close the core, which writes its checkpoint."""
        self._pool.shutdown()
        self._core.close()
        if self._file is not None:
            os.close(self._file)


def _config(path: Path, size: int, slot: int, *, direct: bool, engine: str) -> RawBlockCoreConfig:
    return RawBlockCoreConfig(
        device_path=str(path),
        capacity_bytes=size,
        block_align=_BLOCK,
        header_bytes=_BLOCK,
        slot_bytes=slot,
        use_odirect=direct,
        enable_zero_copy=True,
        meta_total_bytes=_INDEX_BYTES,
        meta_magic=b"LMCIDX01",
        meta_version=1,
        meta_checkpoint_interval_sec=60,
        meta_idle_quiet_ms=100,
        meta_enable_periodic=True,
        meta_verify_on_load=True,
        io_engine=engine,
    )


def _memory(buffer: Any) -> TensorMemoryObj:
    tensor = torch.from_numpy(buffer)
    described = MemoryObjMetadata(
        tensor.shape, torch.uint8, tensor.data_ptr(), tensor.numel(), 1, fmt=MemoryFormat.BINARY_BUFFER
    )
    return TensorMemoryObj(tensor, described, None)
