"""One library under test: a process of its own that runs its methods (`worker.py`), as the driver sees it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.peers.process import PeerError, Process, command_of
from benchmarks.registry import BenchmarkError

__all__ = ["Side"]

_WORKER: Final = Path(__file__).resolve().parent / "worker.py"


class Side:
    """Starts a worker and asks it; one process until it is closed.

    Parameters
    ----------
    name : str
        How tables call the library.
    runner : Path
        What the worker loads.
    packages : Path, optional
        Packages that go before those of this interpreter.
    """

    def __init__(self, name: str, runner: Path, packages: Path | None = None) -> None:
        self.name = name
        variables = {} if packages is None else {"PYTHONPATH": str(packages)}
        self._process = Process(command_of(sys.executable, _WORKER, runner), variables)

    def load(self, folder: Path) -> dict[str, str]:
        """Load a model; the versions of what computes."""
        versions: dict[str, str] = self._ask("load", folder=str(folder))["versions"]
        return versions

    def run(self, method: str, *, keep: int, ids: Sequence[int], feed: Sequence[int]) -> dict[str, Any]:
        """One generation under a method; what `worker.Server.run` tells."""
        return self._ask("run", method=method, keep=keep, ids=list(ids), feed=list(feed))

    def _ask(self, do: str, **fields: Any) -> dict[str, Any]:
        try:
            return self._process.ask(do, **fields)
        except PeerError as error:
            raise BenchmarkError(f"{self.name}, {fields.get('method', do)}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
