"""``kvtier policies``: what can be asked for by name, the paper it comes from, and whether it keeps its laws."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import typer

from kvtier.cli.output import FINE, FOUND_WRONG, DebugFlag, JsonFlag, Screen
from kvtier.cli.policies_check import check
from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["policies"]

policies: Final = typer.Typer(rich_markup_mode=None)
policies.command("check")(check)


@policies.callback(invoke_without_command=True)
def list_policies(context: typer.Context, as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """List the policies and their papers, or check one.

    Exit code 1 if one cannot be loaded.
    """
    if context.invoked_subcommand is not None:
        return
    from kvtier import registry

    listed: list[dict[str, Any]] = []
    broken = False
    with Screen(as_json=as_json, debug=debug) as screen:
        for name in registry.policies.names():
            try:
                listed.append(_describe(name, registry.policies.resolve(name)))
            except (KVTierError, AttributeError) as error:
                broken = True
                screen.warn(f"{name}: {error}")
        if screen.as_json:
            screen.emit(listed)
        else:
            screen.show(_table(listed))
    raise typer.Exit(FOUND_WRONG if broken else FINE)


def _describe(name: str, kind: Any) -> dict[str, Any]:
    roles = sorted(role.value for role in kind.roles)
    return {"name": name, "roles": roles, "paper": kind.paper, "lossless": kind.lossless}


def _table(listed: Sequence[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(title="policies", title_justify="left", show_edge=False)
    for column in ("name", "roles", "exact", "paper"):
        table.add_column(column, overflow="fold")
    for entry in listed:
        table.add_row(entry["name"], ", ".join(entry["roles"]), "yes" if entry["lossless"] else "no", entry["paper"])
    return table
