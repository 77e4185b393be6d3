"""One library under test: a process of its own that runs its methods (`worker.py`), as the driver sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

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
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = os.environ | ({} if packages is None else {"PYTHONPATH": str(packages)})
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(runner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def load(self, folder: Path) -> dict[str, str]:
        """Load a model; the versions of what computes."""
        versions: dict[str, str] = self._ask({"do": "load", "folder": str(folder)})["versions"]
        return versions

    def run(self, method: str, *, keep: int, ids: Sequence[int], feed: Sequence[int]) -> dict[str, Any]:
        """One generation under a method; what `worker.Server.run` tells."""
        return self._ask({"do": "run", "method": method, "keep": keep, "ids": list(ids), "feed": list(feed)})

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchmarkError(f"{self.name} has no pipes")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"the process ended: {self._last_words()}"}
        if "error" in answer:
            raise BenchmarkError(f"{self.name}, {request.get('method', 'load')}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()
