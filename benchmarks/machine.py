"""What a number was measured on: CPU, caches, memory, versions, commit, threads and load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvtier.types import format_bytes, parse_bytes

__all__ = ["QUIET_LOAD", "available_bytes", "describe", "last_level_cache_bytes", "line"]

QUIET_LOAD: Final = 0.5
"""Load average, before a run, above which something else uses the cores."""

_PACKAGES: Final = ("kvtier", "torch", "transformers", "numpy")
_USUAL_CACHE: Final = 32 << 20
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_ROOT: Final = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """The machine and the software as plain values; neither host names nor paths."""
    import torch

    from kvtier.kernels import dispatch

    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "kernels": str(dispatch.chosen("cpu")),
    }


def line(found: Mapping[str, Any]) -> str:
    """One line of it, for the head of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cpu']} ({found['vector_instructions']}), {found['cores']} cores, {found['threads']} threads, "
        f"{format_bytes(found['memory_bytes'])}; {found['python']}, {versions}; commit {found['commit']}"
    )


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache of the first core; a usual size where the system does not say."""
    sizes = [parse_bytes(path.read_text(encoding="ascii").strip()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=_USUAL_CACHE)


def available_bytes() -> int:
    """Bytes of memory that can be used without swapping."""
    for entry in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, amount = entry.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_model() -> str:
    for entry in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = entry.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    """The commit of the checkout, with "+changes" when files differ from it; "unknown" outside a checkout."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return "unknown"

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(_ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = ask("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{commit}+changes" if changed else commit
