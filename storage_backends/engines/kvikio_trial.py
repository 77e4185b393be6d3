"""Whether kvikio works here: asked in a process of its own, with a time limit, before this one imports it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TRIAL_SECONDS", "KvikioTrial", "try_kvikio"]

TRIAL_SECONDS = 60.0
"""How long the trial may take: importing torch and starting CUDA included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvikioTrial:
    """What the trial found.

    Parameters
    ----------
    usable : bool
        A file made the round trip from and to host memory, and on a machine with a GPU from and to its memory.
    reason : str
        Why it is not usable.
    forced : bool
        The environment takes the compatibility mode away, so nothing was tried: kvikio hangs where it then needs it.
    version, compat_mode : str
        As kvikio says.
    gpu_direct : bool
        GPUDirect Storage is active, not the compatibility mode.
    cuda : bool
        The round trip with a CUDA tensor was made.
    """

    usable: bool
    reason: str = ""
    forced: bool = False
    version: str = ""
    compat_mode: str = ""
    gpu_direct: bool = False
    cuda: bool = False

    @property
    def mode(self) -> str:
        """How bytes get between files and a GPU, in words."""
        if self.gpu_direct:
            return "GPUDirect Storage"
        return "compatibility mode: files go through host memory"


def try_kvikio(directory: Path, *, cuda: bool, seconds: float = TRIAL_SECONDS) -> KvikioTrial:
    """Make the round trip in another process.

    Parameters
    ----------
    directory : Path
        Where the file of the trial lies; must exist.
    cuda : bool
        Try a CUDA tensor too.
    seconds : float
        Kill the other process then.
    """
    if importlib.util.find_spec("kvikio") is None:
        return KvikioTrial(usable=False, reason="kvikio is not installed")
    if os.environ.get("KVIKIO_COMPAT_MODE", "").upper() in {"OFF", "FALSE", "NO", "0"}:
        reason = "KVIKIO_COMPAT_MODE=OFF is set: kvikio hangs wherever GPUDirect Storage is missing"
        return KvikioTrial(usable=False, forced=True, reason=reason)
    probe = Path(__file__).with_name("kvikio_probe.py")
    command = [sys.executable, "-P", str(probe), str(directory), *(["cuda"] if cuda else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return KvikioTrial(usable=False, reason=f"kvikio gave no answer in {seconds:g} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return KvikioTrial(usable=False, reason=lines[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return KvikioTrial(
        usable=True,
        version=found["version"],
        compat_mode=found["compat_mode"],
        gpu_direct=bool(found["gds"]) and found["compat_mode"] != "ON",
        cuda=bool(found["cuda"]),
    )
