"""What every call of a session does first: take the lock, record no gradients, refuse what is closed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch
from torch import is_grad_enabled, is_inference_mode_enabled

from kvtier.errors import SessionStateError

if TYPE_CHECKING:
    from kvtier.core.session import Session

__all__ = ["guarded"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def guarded(
    method: Callable[Concatenate[Session, _P], _R],
) -> Callable[Concatenate[Session, _P], _R]:
    """Hold the memory's lock, record no gradients, and refuse a session that is closed or was left half-appended."""

    @functools.wraps(method)
    def call(self: Session, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.memory.lock:
            if self._unusable is not None:
                raise SessionStateError(self._unusable)
            if is_grad_enabled() or is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    return method(self, *args, **kwargs)
            return method(self, *args, **kwargs)

    return call
