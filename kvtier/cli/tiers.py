"""Tiers and budgets from the words of a command line, checked before anything runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtier.errors import InputError
from kvtier.types import parse_bytes

if TYPE_CHECKING:
    from kvtier.core.policy import Policy

__all__ = ["STORE_BYTES", "check_budgets", "peak_bytes", "store_of"]

STORE_BYTES: Final = "8GiB"


def store_of(
    host: str | None,
    nvme: Path | None,
    nvme_capacity: str | None,
    *,
    prefixes: Path | None = None,
    prefix_bytes: str | None = None,
) -> dict[str, Any] | None:
    """A store configuration from directories and sizes; None, kvtier's default, when none was given.

    Parameters
    ----------
    prefixes : Path, optional
        Directory where prompts are kept beyond the process, at most ``prefix_bytes`` of them (8 GiB).

    Raises
    ------
    InputError
        When one of ``--nvme`` and ``--nvme-capacity`` is missing, or two directories were given.
    ConfigError
        For a size that cannot be read.
    """
    if (nvme is None) != (nvme_capacity is None):
        raise InputError("--nvme DIR and --nvme-capacity SIZE go together; give both or neither")
    if prefixes is None and prefix_bytes is not None:
        raise InputError("--store-bytes SIZE is the size of --store DIR; give the directory, too")
    if prefixes is not None and nvme is not None:
        raise InputError("--store and --nvme both take the NVMe tier; give one of them, and --host for the session")
    tiers: list[dict[str, Any]] = []
    if host is not None:
        tiers.append({"name": "host", "backend": "host", "capacity": parse_bytes(host)})
    if nvme is not None and nvme_capacity is not None:
        tiers.append({"name": "nvme", "backend": "spill", "path": str(nvme), "capacity": parse_bytes(nvme_capacity)})
    if prefixes is not None:
        capacity = parse_bytes(prefix_bytes or STORE_BYTES)
        tiers.append({"name": "nvme", "backend": "segment", "path": str(prefixes), "capacity": capacity})
    return {"tiers": tiers} if tiers else None


def check_budgets(policy: "Policy", keep: int | None, read: int | None, context: int) -> None:
    """Refuse token budgets that cannot mean anything for a prompt of ``context`` tokens.

    Raises
    ------
    InputError
        For a budget below one token, or above the prompt: nothing would ever be evicted or left unread.
    """
    asked = {"keep": [keep], "read": [read]}
    for part in policy.parts:
        for word, values in asked.items():
            values.append(getattr(part, word, None))
    for word, values in asked.items():
        for value in values:
            if value is not None and not 1 <= value <= context:
                raise InputError(f"{word} must be from 1 to the {context} tokens of the prompt, got {value}")


def peak_bytes(report: "Mapping[str, Any]") -> dict[str, int]:
    """The most bytes that each tier held, from a session's report as a dict; zero for a tier that was not there."""
    return {tier: int(report["bytes"].get(tier, {}).get("peak", 0)) for tier in ("device", "host", "nvme")}
