"""Calls of one session: one at a time, without gradients, and refused once it was closed or left half-way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import is_grad_enabled, is_inference_mode_enabled

from kvtier.errors import SessionStateError

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["Guarded", "guarded"]

_G = TypeVar("_G", bound="Guarded")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Guarded:
    """What calls of a session have in common; closing is up to the session.

    Attributes
    ----------
    memory : Memory
        Whose lock every call holds.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._unusable: str | None = None

    def check_usable(self) -> None:
        """Refuse a session that was closed, or failed half-way.

        Raises
        ------
        SessionStateError
        """
        if self._unusable is not None:
            raise SessionStateError(self._unusable)

    def close(self) -> None:
        """Free what the session holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _or_unusable(self, what: str) -> Iterator[None]:
        """After an error in here the session can only be closed."""
        try:
            yield
        except BaseException as error:
            self._fail(what, error)
            raise

    def _fail(self, what: str, error: BaseException) -> None:
        self._unusable = f"{what} failed before ({error}); close this session and start again"


def guarded(method: Callable[Concatenate[_G, _P], _R]) -> Callable[Concatenate[_G, _P], _R]:
    """Hold the memory's lock, record no gradients, and refuse a session that is closed or was left half-appended."""

    @functools.wraps(method)
    def call(self: _G, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.memory.lock:
            self.check_usable()
            if is_grad_enabled() or is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    return method(self, *args, **kwargs)
            return method(self, *args, **kwargs)

    return call
