"""A process that answers requests (`answering.py`), as the driver of a benchmark sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

__all__ = ["PeerError", "Process", "command_of"]

_ANSWERING: Final = Path(__file__).resolve().parent / "answering.py"
_LAST_WORDS: Final = 300


class PeerError(RuntimeError):
    """A peer raised, ended or went silent."""


def command_of(python: Path | str, server: Path, runner: Path) -> list[str]:
    """What starts a server over a runner in an environment."""
    return [str(python), "-P", str(_ANSWERING), str(server), str(runner)]


class Process:
    """Starts a server and asks it, until it is killed.

    Parameters
    ----------
    command, variables
        What starts it, and environment variables besides ours.
    patience_seconds : float, optional
        How long an answer may take.
    """

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], *, patience_seconds: float | None = None
    ) -> None:
        self._patience_seconds = patience_seconds
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **variables},
            start_new_session=True,
        )

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises
        ------
        PeerError
            When the server raised, ended or went silent.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise PeerError("the server has no pipes")
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError(f"ended before {do}: {self._last_words()}") from error
        line = self._line(self._process.stdout)
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended in {do}: {self._last_words()}"}
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def kill(self) -> None:
        """SIGKILL the server and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _line(self, pipe: IO[bytes]) -> bytes:
        """The next line; empty when the server ended."""
        # An answer is written at once, and there is one a question: nothing waits in the pipe's own buffer.
        if not select.select([pipe], [], [], self._patience_seconds)[0]:
            raise PeerError(f"no answer in {self._patience_seconds:.0f} s")
        return pipe.readline()

    def _last_words(self) -> str:
        self._process.wait()
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LAST_WORDS))
        text = self._log.read().decode(errors="replace").strip()
        return text.splitlines()[-1] if text else f"exit code {self._process.returncode}"
