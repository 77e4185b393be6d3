"""What ``kvtier doctor`` asks the machine: GPU, pinned memory, direct I/O, free space, GPUDirect Storage."""

from __future__ import annotations

import importlib.util
import mmap
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Final

from kvtier.cli.doctor_check import Check, Probe
from kvtier.types import format_bytes

__all__ = ["MACHINE_PROBES", "existing_directory"]

_SECTOR: Final = 4096  # bytes; O_DIRECT wants address, offset and length aligned to it
_TIGHT_SPACE: Final = 10 * 2**30  # bytes; the KV of one 64K-token prompt of an 8B model
_NO_SPACE: Final = 2**30  # bytes
_KVIKIO_SECONDS: Final = 60.0
_MEMORY_FILESYSTEMS: Final = frozenset({"ramfs", "tmpfs"})


def existing_directory(directory: Path) -> Path:
    """The directory itself, or the nearest parent that exists: a tier makes the rest."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _cuda(name: str, directory: Path) -> Check:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        detail = ", ".join(f"{device.name} {format_bytes(device.total_memory)}" for device in devices)
        return Check(name, "PASS", f"CUDA {torch.version.cuda}: {detail}")
    if not Path("/dev/nvidiactl").exists():
        return Check(name, "WARN", "no NVIDIA GPU here: everything runs on the CPU", "none is needed to try kvtier")
    if torch.version.cuda is None:
        return Check(name, "WARN", "an NVIDIA GPU, but a CPU build of torch", "install a CUDA build of torch")
    detail = f"torch was built for CUDA {torch.version.cuda}, but finds no usable GPU"
    return Check(name, "WARN", detail, "check `nvidia-smi`, the driver version and CUDA_VISIBLE_DEVICES")


def _pinned_memory(name: str, directory: Path) -> Check:
    import torch

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    if not torch.cuda.is_available():
        return Check(name, "PASS", f"not used without a GPU (memlock limit {limit})")
    try:
        torch.empty(2**24, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return Check(name, "WARN", f"refused: {error} (memlock limit {limit})", "raise the limit: ulimit -l unlimited")
    return Check(name, "PASS", f"16 MiB pinned (memlock limit {limit})")


def _direct_io(name: str, directory: Path) -> Check:
    place = existing_directory(directory)
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return Check(name, "WARN", "this system has no O_DIRECT: tiers on disk go through the page cache", "use Linux")
    try:
        handle, path = tempfile.mkstemp(prefix=".kvtier-doctor-", dir=place)
    except OSError as error:
        return Check(
            name, "FAIL", f"{place} cannot be written: {error.strerror}", "choose another directory with --path"
        )
    os.close(handle)
    try:
        _round_trip(path, flag)
    except OSError as error:
        detail = f"{place} ({_filesystem(place)}) refuses O_DIRECT: {error.strerror}"
        return Check(name, "WARN", detail, "works through the page cache; for full speed use ext4 or xfs on NVMe")
    finally:
        Path(path).unlink()
    detail = f"{place} ({_filesystem(place)}) wrote and read {_SECTOR} bytes directly"
    if _filesystem(place) in _MEMORY_FILESYSTEMS:
        return Check(name, "WARN", f"{detail}, but is memory, not a disk", "give a directory on NVMe with --path")
    return Check(name, "PASS", detail)


def _round_trip(path: str, flag: int) -> None:
    """Write one aligned sector and read it back, past the page cache."""
    with mmap.mmap(-1, _SECTOR) as sent, mmap.mmap(-1, _SECTOR) as received:
        sent[:] = bytes(range(256)) * (_SECTOR // 256)
        handle = os.open(path, os.O_RDWR | flag)
        try:
            os.pwritev(handle, [sent], 0)
            os.preadv(handle, [received], 0)
        finally:
            os.close(handle)
        if sent[:] != received[:]:
            raise OSError(0, "it returned other bytes than were written")


def _filesystem(directory: Path) -> str:
    """The type of the file system that holds a directory, as /proc names it."""
    best = ("", "unknown file system")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, kind, *_ = line.split()
        if directory.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def _free_space(name: str, directory: Path) -> Check:
    place = existing_directory(directory)
    free = shutil.disk_usage(place).free
    detail = f"{format_bytes(free)} free in {place}"
    if free < _NO_SPACE:
        return Check(name, "FAIL", detail, "free some space, or choose another directory with --path")
    if free < _TIGHT_SPACE:
        return Check(name, "WARN", detail, f"an NVMe tier wants {format_bytes(_TIGHT_SPACE)} or more")
    return Check(name, "PASS", detail)


def _kvikio(name: str, directory: Path) -> Check:
    if importlib.util.find_spec("kvikio") is None:
        detail = "not installed: NVMe pages reach a GPU through host memory"
        return Check(name, "PASS", detail, "with a GPU that has GPUDirect Storage: pip install kvikio-cu13")
    import torch

    from kvtier.storage_backends.engines.kvikio_trial import try_kvikio

    trial = try_kvikio(existing_directory(directory), cuda=torch.cuda.is_available(), seconds=_KVIKIO_SECONDS)
    if trial.forced:
        return Check(name, "FAIL", trial.reason, "unset KVIKIO_COMPAT_MODE")
    if not trial.usable:
        return Check(name, "WARN", f"installed but unusable: {trial.reason}", "kvtier uses POSIX I/O; check the driver")
    detail = f"{trial.version}, {trial.mode} (compat_mode {trial.compat_mode})"
    if not trial.gpu_direct:
        return Check(name, "WARN", detail, "install nvidia-fs, on a file system that it serves, for direct transfers")
    return Check(name, "PASS", detail)


def _engine(name: str, directory: Path) -> Check:
    from kvtier.storage_backends.engines import choose_engine

    with choose_engine(directory=existing_directory(directory)) as engine:
        found = engine.capabilities()
    return Check(name, "PASS", f"{found.name}: {found.note}" if found.note else found.name)


MACHINE_PROBES: Final = (
    Probe("cuda", _cuda),
    Probe("pinned memory", _pinned_memory),
    Probe("O_DIRECT", _direct_io),
    Probe("free space", _free_space),
    Probe("kvikio", _kvikio),
    Probe("I/O engine", _engine),
)
