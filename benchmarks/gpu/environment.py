"""What a GPU run ran on, as JSON: ``python environment.py FILE``. Every probe may fail; the file is always written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = (
    "kvtier",
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pytest",
    "hypothesis",
    "kvikio-cu13",
    "kvikio-cu12",
)
QUERY: Final = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"


def gpu() -> dict[str, Any]:
    """The first GPU, as torch sees it."""
    import torch

    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "cuda": torch.version.cuda,
        "count": torch.cuda.device_count(),
    }


def driver() -> dict[str, str]:
    """What nvidia-smi tells of it."""
    told = ask("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0")
    return dict(zip(QUERY.split(","), (part.strip() for part in told.split(",")), strict=True))


def kernels() -> str:
    """Which implementations kvtier chooses on the GPU."""
    from kvtier.kernels import dispatch

    return str(dispatch.chosen("cuda"))


def versions() -> dict[str, str | None]:
    """Versions of what matters; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Cores, memory and system; neither host names nor paths."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of the checkout."""
    return ask("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty")


def ask(program: str, *words: str) -> str:
    """What a program prints."""
    path = shutil.which(program)
    if path is None:
        raise FileNotFoundError(f"{program} is not there")
    done = subprocess.run([path, *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


PROBES: Final[dict[str, Callable[[], Any]]] = {
    "machine": machine,
    "versions": versions,
    "commit": commit,
    "gpu": gpu,
    "driver": driver,
    "kernels": kernels,
}


def collect() -> tuple[dict[str, Any], bool]:
    """Every probe's answer or error, and whether the GPU was found."""
    found: dict[str, Any] = {}
    for name, probe in PROBES.items():
        try:
            found[name] = probe()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a machine belongs into the file
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found, "error" not in found["gpu"]


if __name__ == "__main__":
    answers, whole = collect()
    Path(sys.argv[1]).write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(answers, indent=1))
    sys.exit(0 if whole else 1)
