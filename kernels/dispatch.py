"""Which implementation of an operator runs: chosen by device or ``KVTIER_KERNELS``, and told to ``kvtier doctor``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import torch

from kvtier.errors import ConfigError

__all__ = ["ENVIRONMENT_VARIABLE", "Candidate", "Choice", "Chosen", "Operator", "chosen"]

ENVIRONMENT_VARIABLE: Final = "KVTIER_KERNELS"
IMPLEMENTATIONS: Final = ("reference", "blocked", "native", "triton")
OPERATORS: Final = (
    "column_sums",
    "encoded_attention",
    "gather_attention",
    "lowrank_keys",
    "merge_partials",
    "pack_pages",
    "page_scores",
    "page_summaries",
    "prefix_attention",
    "ranked_attention",
    "split_rows",
    "top_pages",
    "weighed_attention",
)

K = TypeVar("K")


def _fits_anywhere(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Candidate(Generic[K]):
    """One implementation of an operator.

    Parameters
    ----------
    name : str
        What ``KVTIER_KERNELS`` calls it: ``"reference"``, ``"blocked"``.
    load : callable
        Returns the implementation; called once, when it is first chosen, so that it may import what others do without.
    why : str
        Why one would choose it; shown by ``kvtier doctor``.
    obstacle : callable
        Why it cannot run on a device, or None when it can.
    """

    name: str
    load: Callable[[], K]
    why: str
    obstacle: Callable[[torch.device], str | None] = _fits_anywhere


class Choice(NamedTuple):
    """The implementation that was chosen, and why."""

    implementation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """What runs on one device, operator by operator."""

    device: str
    choices: Mapping[str, Choice]

    def __str__(self) -> str:
        groups: dict[Choice, list[str]] = {}
        for operator, choice in self.choices.items():
            groups.setdefault(choice, []).append(operator)
        told = (f"{choice.implementation} for {', '.join(names)} ({choice.reason})" for choice, names in groups.items())
        return f"{self.device}: {'; '.join(told)}"


class Operator(Generic[K]):
    """An operator with several implementations, the preferred first.

    A choice is made once per device and kept, so ``KVTIER_KERNELS`` must be set before the first call. Any thread may
    ask; two that ask first at the same time come to the same answer.
    """

    def __init__(self, name: str, candidates: Sequence[Candidate[K]]) -> None:
        self.name = name
        self._candidates = tuple(candidates)
        self._on: dict[torch.device, K] = {}

    def on(self, device: torch.device) -> K:
        """The implementation for tensors on ``device``.

        Raises
        ------
        ConfigError
            When ``KVTIER_KERNELS`` asks for what does not exist or cannot run there.
        """
        try:
            return self._on[device]
        except KeyError:
            candidate, _ = self._choose(device)
            return self._on.setdefault(device, candidate.load())

    def choice(self, device: torch.device) -> Choice:
        """The name of what would be chosen for ``device`` now, and why."""
        candidate, reason = self._choose(device)
        return Choice(candidate.name, reason)

    def _choose(self, device: torch.device) -> tuple[Candidate[K], str]:
        wanted = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
        names = [candidate.name for candidate in self._candidates]
        # Not every operator has every implementation: one without takes the next best.
        if wanted != "auto" and (wanted in names or wanted not in IMPLEMENTATIONS):
            return self._named(wanted, device), f"asked for by {ENVIRONMENT_VARIABLE}={wanted}"
        passed_over: list[str] = []
        for candidate in self._candidates:
            obstacle = candidate.obstacle(device)
            if obstacle is None:
                return candidate, "; ".join([candidate.why, *passed_over])
            passed_over.append(f"not {candidate.name}: {obstacle}")
        raise ConfigError(f"no implementation of {self.name} runs on {device}: {'; '.join(passed_over)}")

    def _named(self, wanted: str, device: torch.device) -> Candidate[K]:
        names = [candidate.name for candidate in self._candidates]
        if wanted not in names:
            raise ConfigError(
                f"{ENVIRONMENT_VARIABLE} must be one of auto, {', '.join(names)} for {self.name}, got {wanted!r}"
            )
        candidate = self._candidates[names.index(wanted)]
        obstacle = candidate.obstacle(device)
        if obstacle is not None:
            raise ConfigError(
                f"{ENVIRONMENT_VARIABLE}={wanted} cannot run {self.name} on {device}: {obstacle}; unset it or use auto"
            )
        return candidate


def chosen(device: torch.device | str = "cpu") -> Chosen:
    """What runs on ``device`` for every operator of kvtier, and why.

    Raises
    ------
    ConfigError
        When ``KVTIER_KERNELS`` asks for what does not exist or cannot run there.
    """
    where = torch.device(device)
    operators = {name: importlib.import_module(f"kvtier.kernels.{name}").OPERATOR for name in OPERATORS}
    return Chosen(str(where), {name: operator.choice(where) for name, operator in operators.items()})
