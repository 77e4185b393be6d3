"""Where a verb speaks: its result to stdout, everything else to stderr."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Final, Self, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

__all__ = [
    "BAD_USE",
    "FINE",
    "FOUND_WRONG",
    "INTERRUPTED",
    "NOT_READ",
    "DebugFlag",
    "JsonFlag",
    "QuietFlag",
    "Screen",
    "hold_standard_streams",
]

FINE: Final = 0
FOUND_WRONG: Final = 1
BAD_USE: Final = 2
INTERRUPTED: Final = 130
NOT_READ: Final = 141  # whoever read the output left before its end, as a shell says it of SIGPIPE

_PIPE_WIDTH: Final = 120  # columns of a table that no terminal limits

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout, everything else to stderr.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no notes.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Log in detail, and show the traceback of an error.")]


class Screen:
    """The two streams of a verb.

    Entered, it sends whatever libraries print to stderr when the result is JSON, so that stdout holds the one value and
    nothing else.

    Parameters
    ----------
    as_json : bool
        The result is one JSON value; no table and no progress bar.
    quiet : bool
        No progress bars and no notes on stderr.
    debug : bool
        Log everything of kvtier to stderr.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug
        self._stdout: TextIO = sys.stdout
        self._redirect = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stdout = sys.stdout
        if self.as_json:
            self._redirect.enter_context(contextlib.redirect_stdout(sys.stderr))
        if self.debug:
            self._redirect.enter_context(_debug_log())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redirect.close()

    @property
    def bars(self) -> bool:
        """Whether progress bars are drawn: a person looks at stderr and did not ask for silence."""
        return sys.stderr.isatty() and not self.quiet and not self.as_json

    def emit(self, value: object) -> None:
        """Print a value as JSON, the only thing on stdout."""
        with _writing():
            print(json.dumps(value, indent=2, allow_nan=False), file=self._stdout, flush=True)

    def show(self, *renderables: "RenderableType") -> None:
        """Print text, as it is, and tables for a person to stdout."""
        console = self._console(self._stdout)
        with _writing():
            for renderable in renderables:
                if isinstance(renderable, str):
                    print(renderable, file=self._stdout, flush=True)
                else:
                    console.print(renderable)

    def note(self, text: str) -> None:
        """Say something in passing on stderr, unless silence was asked for."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say on stderr what was found wrong; not even ``--quiet`` hides it."""
        print(f"wrong: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(self) -> "Iterator[Progress]":
        """Progress bars on stderr; the same object draws nothing when ``bars`` is false."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        done = TextColumn("{task.completed:.0f}/{task.total:.0f}")
        columns = (TextColumn("{task.description}"), BarColumn(), done, TimeElapsedColumn())
        with Progress(*columns, console=self._console(sys.stderr), transient=True, disable=not self.bars) as bars:
            yield bars

    @contextlib.contextmanager
    def byte_progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar with a bandwidth on stderr, for a function that is told bytes done and bytes in all, by any thread."""
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        words = TextColumn("{task.description}")
        columns = (words, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
        with Progress(*columns, console=self._console(sys.stderr), transient=True, disable=not self.bars) as bars:
            task = bars.add_task(what, total=None, visible=False)
            yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)

    def _console(self, stream: TextIO) -> "Console":
        from rich.console import Console

        width = None if stream.isatty() else _PIPE_WIDTH
        return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def hold_standard_streams() -> None:
    """Put what swallows everything in place of streams that were closed, before a file of a store gets their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for the whole process


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Say of an error that it is about the output, not about what the verb looked at."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"standard output: {error.strerror}") from error


@contextlib.contextmanager
def _debug_log() -> Iterator[None]:
    """Every log record of kvtier on stderr while a verb runs."""
    logger = logging.getLogger("kvtier")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(relativeCreated)7.0f ms %(name)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
