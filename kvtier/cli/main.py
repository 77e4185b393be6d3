"""The ``kvtier`` command: its verbs, and the one place where errors become a line and an exit code."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from kvtier import __version__
from kvtier.cli.demo import demo
from kvtier.cli.doctor import doctor
from kvtier.cli.generate import generate
from kvtier.cli.inspect import inspect
from kvtier.cli.output import BAD_USE, FOUND_WRONG, INTERRUPTED, NOT_READ, hold_standard_streams
from kvtier.cli.policies import policies
from kvtier.cli.verify import verify
from kvtier.errors import KVTierError

__all__ = ["app", "run"]

# Plain help: rich panels would triple the time that `kvtier --help` takes.
app: Final = typer.Typer(
    name="kvtier",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, generate, doctor, inspect, verify):
    app.command()(verb)
app.add_typer(policies, name="policies")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvtier {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def kvtier(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """The memory system under a long-context language model.

    Keeps the KV cache on the cheapest tier that is fast enough (device, host, NVMe) and says what that cost.
    """
    if context.invoked_subcommand is None and not version:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(BAD_USE)


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Parameters
    ----------
    args : sequence of str, optional
        Words after the program's name; those of the process by default.

    Returns
    -------
    int
        0 fine, 1 something was found wrong, 2 bad use, 130 interrupted, 141 nobody read the output to its end.

    Notes
    -----
    Bad use, bad input and every error of kvtier become one line on stderr; ``--debug`` adds the traceback.
    """
    words = list(sys.argv[1:] if args is None else args)
    hold_standard_streams()
    try:
        code = app(words, prog_name="kvtier", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as exit_:  # what click and rich make of a broken pipe
        if isinstance(exit_.__context__, BrokenPipeError):
            return NOT_READ
        raise
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return _explain(error)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    """Say an error in one line on stderr; the exit code that it means."""
    # Typer's own usage errors changed their base class between versions; this method is what they all have.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        message, code = str(format_message()), BAD_USE
    elif isinstance(error, KVTierError):
        message, code = str(error), BAD_USE
    elif isinstance(error, OSError):
        message, code = _describe_os_error(error), BAD_USE
    elif isinstance(error, MemoryError):
        message, code = f"not enough memory: {error}", BAD_USE
    else:
        message = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        code = FOUND_WRONG
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _describe_os_error(error: OSError) -> str:
    """What the system refused and on which path."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{os.fspath(error.filename)!r}: {reason}" if isinstance(error.filename, str | os.PathLike) else reason
