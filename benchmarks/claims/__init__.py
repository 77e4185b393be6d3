"""Published claims about policies, ours beside theirs, on a constructed model whose answers need no judge."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from benchmarks.claims import gemfilter_layers, later_questions
from benchmarks.claims.claim import Claim
from benchmarks.claims.scene import build_scene

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CLAIMS", "add_options", "run", "show"]

CLAIMS: Final[Mapping[str, Claim]] = {"A8": gemfilter_layers.CLAIM, "A10": later_questions.CLAIM}
_QUICK: Final = {"context": 1024, "needles": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Which claims, tokens of a prompt, facts in it, one token of how many is kept or read, and the seed."""

    only: tuple[str, ...] = tuple(CLAIMS)
    context: int = 4096
    needles: int = 12
    share: int = 8
    seed: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which claims, and how large."""
    parser.add_argument("--only", type=_names, help=f"which of {', '.join(CLAIMS)}; all by default")
    parser.add_argument("--context", type=int, help="tokens of a prompt")
    parser.add_argument("--needles", type=int, help="facts in the text, each asked for")
    parser.add_argument("--seed", type=int, help="which facts, and where")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every claim."""
    given = {name: value for name in asdict(Settings()) if (value := getattr(options, name, None)) is not None}
    settings = Settings(**{**(_QUICK if options.quick else {}), **given})
    results = []
    for name in settings.only:
        claim = CLAIMS[name]
        scene = build_scene(
            context=settings.context,
            needles=settings.needles,
            layers=claim.layers,
            share=settings.share,
            seed=settings.seed,
        )
        told = {key: getattr(claim, key) for key in ("title", "published", "source", "layers", "cannot")}
        results.append({"claim": name, **told, "budget": scene.budget, **asdict(claim.measure(scene))})
    return {"settings": asdict(settings), "results": results}


def show(result: Mapping[str, Any], console: Console) -> None:
    """A table for each claim, between the published number and what ours does not say."""
    from rich.table import Table

    for found in result["results"]:
        console.print(f"\n{found['claim']}: {found['title']}")
        console.print(f"published: {found['published']} ({found['source']})")
        verdict = "the shape shows" if found["holds"] else "the shape does not show"
        console.print(f"ours: {found['ours']}; {verdict}")
        table = Table()
        for name, value in found["rows"][0].items():
            table.add_column(name, justify="left" if isinstance(value, str) else "right")
        for row in found["rows"]:
            table.add_row(*map(str, row.values()))
        console.print(table)
        console.print(f"not said: {found['cannot']}")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in CLAIMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(CLAIMS)}, got {', '.join(unknown)}")
    return names
