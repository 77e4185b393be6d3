"""``kvtier policies``: what can be asked for by name, and the paper it comes from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from kvtier.cli.output import FINE, FOUND_WRONG, DebugFlag, JsonFlag, Screen
from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["policies"]


def policies(as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """List the policies and their papers.

    Exit code 1 if one cannot be loaded.
    """
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
