"""The work of ``kvtier demo``: a text with needles, one run with the stock cache, one under each policy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtier.cli.demo_row import STOCK, Row, run_policy, run_stock
from kvtier.cli.demo_scene import Scene, build_scene
from kvtier.cli.tiers import check_budgets
from kvtier.core.policy import Policy, Role
from kvtier.errors import InputError
from kvtier.types import Budgets

if TYPE_CHECKING:
    from kvtier.cli.output import Screen

__all__ = ["DemoResult", "Settings", "run_demo", "split_policies"]

_DEVICE_SHARE: Final = 6  # the device holds less than a quarter of the KV cache, working space included
_LEAST_DEVICE: Final = 2**21  # bytes; the tails and sketches of two sessions, and room to work
_KEEP_SHARE: Final = 8
_READ_SHARE: Final = 16
_LEAST_TOKENS: Final = 128  # of short texts: the raw tail and a few pages
_TIER_FACTOR: Final = 2  # room for everything, and for pages that are not full


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The words of one command line.

    Parameters
    ----------
    device, host : int, optional
        Bytes; by default a share of the whole KV cache, and room for all of it.
    keep, read : int, optional
        Tokens; by default a share of the context.
    """

    document: Path | None
    context: int
    needles: int
    policies: tuple[str, ...]
    device: int | None
    host: int | None
    nvme: Path | None
    keep: int | None
    read: int | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """All rows, the stock one first, and what they ran on."""

    scene: Scene
    rows: tuple[Row, ...]
    device_bytes: int

    @property
    def complaints(self) -> list[str]:
        """Where exact attention was not exact: other tokens than transformers', or a needle it did not find."""
        wanted = len(self.scene.document.needles)
        wrong = []
        for row in self.rows:
            if row.lossless and row.agreement < 1.0:
                wrong.append(
                    f"{row.name} is exact, but only {row.agreement:.1%} of its tokens are those of transformers"
                )
            if row.lossless and row.found < wanted:
                wrong.append(f"{row.name} is exact, but found only {row.found} of {wanted} needles")
        return wrong


def split_policies(text: str) -> tuple[str, ...]:
    """Names between commas; a comma in parentheses belongs to a policy: ``"full, snapkv(window=32, kernel=5)"``.

    Raises
    ------
    InputError
        When there is nothing between two commas.
    """
    names = tuple(name.strip() for name in re.split(r",(?![^()]*\))", text))
    if not all(names):
        raise InputError(f"--policies must be names separated by commas, got {text!r}")
    return names


def run_demo(settings: Settings, screen: Screen) -> DemoResult:
    """Build the scene and run every row.

    Raises
    ------
    InputError, PolicyError
        For a document, context, budget or policy that cannot work; before the model runs.
    """
    chosen = _policies(settings)
    screen.note("building the text and the model")
    scene = build_scene(settings.document, context=settings.context, needles=settings.needles, seed=settings.seed)
    share = max(_LEAST_DEVICE, scene.kv_bytes // _DEVICE_SHARE)
    device = settings.device if settings.device is not None else share
    store = _store(settings, scene)
    with screen.progress() as bars:
        steps = len(scene.questions) + 1
        task = bars.add_task(STOCK, total=steps)
        rows = [run_stock(scene, lambda: bars.advance(task))]
        for name, policy in chosen.items():
            bars.reset(task, description=name, total=steps)
            budgets = _budgets(policy, settings, device)
            rows.append(run_policy(scene, rows[0], name, policy, budgets, store, lambda: bars.advance(task)))
    return DemoResult(scene=scene, rows=tuple(rows), device_bytes=device)


def _policies(settings: Settings) -> dict[str, Policy]:
    """The policies by the names they were asked for."""
    from kvtier.core.compose import policy

    chosen = {name: policy(name) for name in settings.policies}
    for one in chosen.values():
        check_budgets(one, settings.keep, settings.read, settings.context)
    return chosen


def _budgets(policy: Policy, settings: Settings, device: int) -> Budgets:
    """The budgets that this policy has a use for, unless it brings its own."""
    shares: dict[str, int] = {}
    evicts = any(Role.SELECTION in part.roles for part in policy.parts)
    for word, role, asked, default in (
        ("keep", Role.SELECTION if evicts else Role.PROMPT_FILTER, settings.keep, settings.context // _KEEP_SHARE),
        ("read", Role.RETRIEVAL, settings.read, settings.context // _READ_SHARE),
    ):
        takers = [part for part in policy.parts if role in part.roles]
        if takers and all(getattr(part, word, None) is None for part in takers):
            shares[word] = asked if asked is not None else max(_LEAST_TOKENS, default)
    return Budgets(device=device, **shares)


def _store(settings: Settings, scene: Scene) -> dict[str, Any]:
    """The tiers below the device: host memory, and NVMe where a directory was given."""
    room = _TIER_FACTOR * scene.kv_bytes
    host = settings.host if settings.host is not None else room
    tiers: list[dict[str, Any]] = [{"name": "host", "backend": "host", "capacity": host}]
    if settings.nvme is not None:
        tiers.append({"name": "nvme", "backend": "spill", "path": str(settings.nvme), "capacity": room})
    return {"tiers": tiers}
