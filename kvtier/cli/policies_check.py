"""``kvtier policies check``: the laws of a policy's roles, and the smallest case that breaks one."""

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtier.cli.output import FINE, FOUND_WRONG, DebugFlag, JsonFlag, QuietFlag, Screen
from kvtier.errors import MissingDependencyError, PolicyError

if TYPE_CHECKING:
    from rich.table import Table

    from kvtier.core.policy import Policy
    from kvtier.testing.check import Verdict

__all__ = ["check"]

_STATES = {True: "holds", False: "broken", None: "does not apply"}

Target = Annotated[
    str, typer.Argument(help="my_package.module:MyPolicy (a class, a function or an object), or 'snapkv(window=4)'.")
]
Examples = Annotated[int, typer.Option("--examples", "-n", min=1, help="Cases drawn for each law.")]
Laws = Annotated[list[str] | None, typer.Option("--law", help="Check only this law, by its code; may be repeated.")]


def check(
    policy: Target,
    examples: Examples = 60,
    law: Laws = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Hold a policy to the laws of its roles.

    Exit code 1 if it breaks one, with the smallest case that does.
    """
    with Screen(as_json=as_json, quiet=quiet, debug=debug) as screen:
        chosen = _load(policy)
        verdicts = _run(chosen, examples, law or [], screen)
        broken = [verdict for verdict in verdicts if verdict.holds is False]
        if screen.as_json:
            screen.emit(_summary(policy, chosen, examples, verdicts))
        else:
            screen.show(_table(verdicts), *(f"\n{verdict.found}" for verdict in broken))
            screen.show(f"\n{len(broken)} of {len(verdicts)} laws broken, {examples} cases a law")
    raise typer.Exit(FOUND_WRONG if broken else FINE)


def _load(target: str) -> "Policy":
    """The policy that a target names."""
    from kvtier.core.compose import policy
    from kvtier.core.policy import Policy

    module, colon, attribute = target.partition(":")
    if not colon:
        return policy(target)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise PolicyError(
            f"{target!r}: {module} cannot be imported ({error}); install it, or put its folder on PYTHONPATH"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise PolicyError(f"{target!r}: {module} has no {attribute}; write module:Class, or module:function")
        found = getattr(found, name)
    if callable(found) and not isinstance(found, Policy):
        try:
            found = found()
        except TypeError as error:
            raise PolicyError(
                f"{target!r} must be made without arguments ({error}); name a function that does"
            ) from error
    if not isinstance(found, Policy):
        raise PolicyError(f"{target!r} is a {type(found).__name__}, which is no kvtier.core.policy.Policy")
    return found


def _run(policy: "Policy", examples: int, only: Sequence[str], screen: Screen) -> "list[Verdict]":
    try:
        from kvtier.testing.check import check_policy, suites_of
        from kvtier.testing.law import laws_of
    except ImportError as error:
        raise MissingDependencyError(f"the laws need {error.name}; pip install 'kvtier[test]'") from error

    known = {law.code for part in policy.parts for suite in suites_of(part) for law in laws_of(suite)}
    unknown = sorted(set(only) - known)
    if unknown:
        raise PolicyError(f"{policy.name} has no law {unknown[0]}; its laws are {', '.join(sorted(known)) or 'none'}")
    verdicts = []
    with screen.progress() as bars:
        bar = bars.add_task("laws", total=len(only) or len(known))
        for verdict in check_policy(policy, examples=examples, only=only):
            verdicts.append(verdict)
            bars.advance(bar)
    return verdicts


def _summary(target: str, policy: "Policy", examples: int, verdicts: "Sequence[Verdict]") -> dict[str, Any]:
    roles = sorted({role.value for part in policy.parts for role in part.roles})
    laws = [asdict(verdict) for verdict in verdicts]
    broken = sum(verdict.holds is False for verdict in verdicts)
    return {"policy": target, "roles": roles, "examples": examples, "broken": broken, "laws": laws}


def _table(verdicts: "Sequence[Verdict]") -> "Table":
    from rich.table import Table

    table = Table(title="laws", title_justify="left", show_edge=False)
    for column in ("policy", "law", "", "says"):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        reason = f" ({verdict.found})" if verdict.holds is None else ""
        table.add_row(verdict.policy, verdict.code, _STATES[verdict.holds], verdict.title + reason)
    return table
