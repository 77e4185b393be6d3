"""A store served by another process (`serve.py`), as the driver of a benchmark sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from benchmarks.peers.process import Process

__all__ = ["Answer", "Calls", "Client", "Opened", "Pieces"]

Calls = Sequence[Sequence[int]]
"""Numbers of pieces, by call."""

_PATIENCE_SECONDS: Final = 120.0


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
        self._process = Process(command, variables, patience_seconds=_PATIENCE_SECONDS)

    def open(self, directory: Path, pieces: Pieces, *, direct: bool, durable: bool) -> Opened:
        """Open a store there."""
        directory.mkdir(parents=True, exist_ok=True)
        answer = self._process.ask(
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
        return tuple(self._process.ask("put", calls=calls)["seconds"])

    def get(self, calls: Calls) -> Answer:
        """Read pieces and compare them with what was put."""
        answer = self._process.ask("get", calls=calls)
        return Answer(**{key: tuple(answer[key]) for key in ("seconds", "right", "wrong", "missing")})

    def sample(self, index: int) -> bytes:
        """Bytes in the middle of a piece, by which it is found on the disk."""
        return bytes.fromhex(self._process.ask("sample", index=index)["bytes"])

    def close_store(self) -> None:
        """Close what `open` opened."""
        self._process.ask("close")

    def kill(self) -> None:
        """SIGKILL the server and all that it started."""
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
