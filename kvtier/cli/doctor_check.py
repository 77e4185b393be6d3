"""One line of a medical report: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Check", "Probe", "Status", "run_probe"]

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one probe found.

    Parameters
    ----------
    status : "PASS" | "WARN" | "FAIL"
        Fine; works but slower or untested; something of kvtier will not work.
    fix : str
        What to do; empty when there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Probe:
    """A named look at the machine; ``look`` takes the directory meant for the NVMe tier."""

    name: str
    look: Callable[[str, Path], Check]


def run_probe(probe: Probe, directory: Path) -> Check:
    """What a probe found; a probe that raises becomes a warning, never a crash."""
    try:
        return probe.look(probe.name, directory)
    # Half-installed packages raise anything at import, SystemExit included.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(probe.name, "WARN", f"could not be probed: {reason}", "see the reason; the other checks hold")
