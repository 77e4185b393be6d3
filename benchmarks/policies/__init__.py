"""What stays of a prompt: time, bytes and agreement of each method, beside kvpress; and what statistics cost."""

from __future__ import annotations

import argparse
import random
import statistics as stats
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers import environments
from benchmarks.policies import costs, tables
from benchmarks.policies.models import Question, save_induction, save_random
from benchmarks.policies.settings import METHODS, PROPER, QUICK, Settings
from benchmarks.policies.side import Side
from benchmarks.registry import BenchmarkError
from kvtier.registry import policies

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "run", "show"]

_PARTS = ("methods", "planning", "statistics")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Parts, sizes, and whether to make the peer's environment."""
    parser.add_argument("--parts", type=_parts, default=_PARTS, help=f"which of {', '.join(_PARTS)}; all by default")
    parser.add_argument("--context", type=int, help="tokens of the prompt (default: 4096)")
    parser.add_argument("--rounds", type=int, help="turns of every method (default: 2)")
    parser.add_argument("--install", action="store_true", help="make kvpress's environment, below .peers/")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every part."""
    settings = QUICK if options.quick else PROPER
    given = {name: getattr(options, name) for name in ("context", "rounds") if getattr(options, name) is not None}
    settings = replace(settings, **given)
    if options.install:
        try:
            environments.install(environments.KVPRESS)
        except environments.EnvironmentBuildError as error:
            print(f"kvpress was not installed: {error}", file=sys.stderr)
    measures: Mapping[str, Callable[[Settings], Any]] = {
        "methods": _methods,
        "planning": costs.planning,
        "statistics": costs.statistics,
    }
    results: dict[str, Any] = {}
    for part in options.parts:
        print(f"policies: {part}", file=sys.stderr, flush=True)
        results[part] = measures[part](settings)
    return {"settings": asdict(settings), "results": results}


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table a part."""
    for part, measured in result["results"].items():
        for shown in tables.TABLES[part](measured):
            console.print(shown)


def _methods(settings: Settings) -> dict[str, Any]:
    """Both libraries on the same two models."""
    with tempfile.TemporaryDirectory() as folder, _sides() as sides:
        at = Path(folder)
        prompt, questions = save_random(settings, at / "random"), save_induction(settings, at / "induction")
        versions = {side.name: side.load(at / "random") for side in sides}
        timed = _timed(settings, sides, prompt)
        for side in sides:
            side.load(at / "induction")
        found = _asked(settings, sides, questions)
    absent = environments.installed(environments.KVPRESS)
    rows = [{**row, **found[row["side"], row["method"]]} for row in timed]
    return {"versions": versions, "left_out": {} if absent is None else {"kvpress": absent}, "rows": rows}


@contextmanager
def _sides() -> Iterator[list[Side]]:
    """kvtier, and kvpress if its environment is there."""
    with ExitStack() as stack:
        here = Path(__file__).resolve().parent
        sides = [stack.enter_context(Side("kvtier", here / "ours.py"))]
        if environments.installed(environments.KVPRESS) is None:
            runner = environments.HERE / "kvpress" / "runner.py"
            packages = environments.packages(environments.KVPRESS)
            sides.append(stack.enter_context(Side("kvpress", runner, packages)))
        yield sides


def _timed(settings: Settings, sides: Sequence[Side], prompt: list[int]) -> list[dict[str, Any]]:
    """Every method of every side once a round, in an order drawn anew; the first round warms up."""
    feed = sides[0].run("full", keep=0, ids=prompt, feed=[])["tokens"] * settings.steps
    turns = [(side, method) for side in sides for method in _known()]
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {(side.name, method): [] for side, method in turns}
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order, not a secret
    for turn in range(settings.rounds + 1):
        shuffle(turns)
        # The whole cache first where the others are compared with it.
        for side, method in sorted(turns, key=lambda one: turn == 0 and one[1] != "full"):
            told = side.run(method, keep=settings.context // settings.share, ids=prompt, feed=feed)
            if turn:
                taken[side.name, method].append(told)
    return [_row(side, method, told) for (side, method), told in taken.items()]


def _row(side: str, method: str, told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    prefill = [one["prefill_s"] for one in told]
    decode = [stats.median(one["decode_s"]) for one in told]
    return {
        "side": side,
        "method": method,
        "prefill_s": stats.median(prefill),
        "decode_s": stats.median(decode),
        "rounds": {"prefill_s": prefill, "decode_s": decode},
        "kv_bytes": told[-1]["kv_bytes"],
        "same_tokens": told[-1]["same_tokens"],
        "divergence": told[-1]["divergence"],
    }


def _asked(
    settings: Settings, sides: Sequence[Side], questions: Sequence[Question]
) -> dict[tuple[str, str], dict[str, Any]]:
    """How many facts of the induction model's text each method finds, asked one by one."""
    found = {}
    for side in sides:
        for method in _known():
            right = 0
            for ids, answer in questions:
                told = side.run(method, keep=len(ids) // settings.share, ids=ids, feed=answer[:-1])
                right += told["tokens"] == answer
            found[side.name, method] = {"found": right, "needles": len(questions)}
            if method == "full" and right < len(questions):
                raise BenchmarkError(f"{side.name} finds {right} of {len(questions)} facts in the whole cache")
    return found


def _known() -> list[str]:
    """The methods of both that this kvtier has, and the whole cache."""
    names = policies.names()
    return ["full", *(method for method in METHODS if method.replace(" ", "_") in names)]


def _parts(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    unknown = [word for word in found if word not in _PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_PARTS)}, got {', '.join(unknown)}")
    return found
