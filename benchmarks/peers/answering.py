"""Answer over standard input and output, a JSON object a line, in the environment that a competitor needs.

``python -P answering.py SERVER.py RUNNER.py``: the server has a class ``Server``, whose methods answer requests by
name, and says in ``RUNS`` which class of the runner it is made from. `benchmarks.peers.process` asks. Nothing is
imported from kvtier, which such an environment lacks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TextIO


def main() -> None:
    """Answer until the input ends."""
    answers = _answers()
    server: object = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            server = server or _server(Path(sys.argv[1]), Path(sys.argv[2]))
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - whatever a competitor raises is a result
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _server(serving: Path, running: Path) -> object:
    server = _load(serving)
    return server.Server(getattr(_load(running), server.RUNS))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _answers() -> TextIO:
    """The pipe to the driver; whatever else is printed, by any library, goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
