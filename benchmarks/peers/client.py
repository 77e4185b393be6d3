"""A store served by another process (`serve.py`), as the driver of a benchmark sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, NamedTuple, Self

__all__ = ["Answer", "Calls", "Client", "Opened", "PeerError", "Pieces"]

Calls = Sequence[Sequence[int]]
"""Numbers of pieces, by call."""

_PATIENCE_SECONDS: Final = 120.0
_LAST_WORDS: Final = 300


class PeerError(RuntimeError):
    """A peer raised, ended or went silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What is stored: so many pieces of so many bytes."""

    count: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a read gave.

    Attributes
    ----------
    seconds : tuple of float
        Of each call.
    right, wrong, missing : tuple of int
        Pieces that came back as they were stored; that came back otherwise, as if all were well; that did not.
    """

    seconds: tuple[float, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    missing: tuple[int, ...]


class Opened(NamedTuple):
    """What a peer says of itself: its settings, and why the time of its puts means nothing; empty when it does."""

    note: str
    untimed_put: str


class Client:
    """Starts a server and speaks with it; one process until `close` or `kill`.

    Parameters
    ----------
    command, variables
        What starts it, and environment variables besides ours.
    options : mapping
        Goes with every `open`.
    """

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], options: Mapping[str, Any] | None = None
    ) -> None:
        self._options = dict(options or {})
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **variables},
            start_new_session=True,
        )

    def open(self, directory: Path, pieces: Pieces, *, direct: bool, durable: bool) -> Opened:
        """Open a store there."""
        directory.mkdir(parents=True, exist_ok=True)
        answer = self._ask(
            "open",
            directory=str(directory),
            piece_bytes=pieces.nbytes,
            pieces=pieces.count,
            direct=direct,
            durable=durable,
            **self._options,
        )
        return Opened(answer["note"], answer["untimed_put"])

    def put(self, calls: Calls) -> tuple[float, ...]:
        """Store pieces; the seconds of each call."""
        return tuple(self._ask("put", calls=calls)["seconds"])

    def get(self, calls: Calls) -> Answer:
        """Read pieces and compare them with what was put."""
        answer = self._ask("get", calls=calls)
        return Answer(**{key: tuple(answer[key]) for key in ("seconds", "right", "wrong", "missing")})

    def sample(self, index: int) -> bytes:
        """Bytes in the middle of a piece, by which it is found on the disk."""
        return bytes.fromhex(self._ask("sample", index=index)["bytes"])

    def close_store(self) -> None:
        """Close what `open` opened."""
        self._ask("close")

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

    def _ask(self, do: str, **fields: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise PeerError("the server has no pipes")
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError(f"ended before {do}: {self._last_words()}") from error
        line = self._line()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended in {do}: {self._last_words()}"}
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _line(self) -> bytes:
        """The next line; empty when the server ended."""
        pipe = self._process.stdout
        if pipe is None:
            return b""
        until = time.monotonic() + _PATIENCE_SECONDS
        # An answer is written at once, and there is one a question: nothing waits in the pipe's own buffer.
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            raise PeerError(f"no answer in {_PATIENCE_SECONDS:.0f} s")
        return pipe.readline()

    def _last_words(self) -> str:
        self._process.wait()
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LAST_WORDS))
        text = self._log.read().decode(errors="replace").strip()
        return text.splitlines()[-1] if text else f"exit code {self._process.returncode}"
