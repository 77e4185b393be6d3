"""A clock around kernels: how long the kernel calls of a step take, and the same calls again without the session."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable
from functools import wraps
from types import FunctionType, TracebackType
from typing import Any, Final, NamedTuple, Self

from kvtier.kernels import column_sums, gather_attention, merge_partials, page_scores, page_summaries

__all__ = ["KernelClock"]

_OPERATORS: Final = (column_sums, gather_attention, merge_partials, page_scores, page_summaries)


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class KernelClock:
    """While entered, every kernel call from outside the kernels is timed and remembered.

    Whatever module of kvtier holds a public function of a kernel gets one that looks at the clock around it. The
    clock's own cost, under a microsecond a call, counts as session.

    Attributes
    ----------
    seconds : float
        Spent in kernels since the clock was entered last.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._calls: list[_Call] = []
        self._undo: list[tuple[object, str, Callable[..., Any]]] = []

    def __enter__(self) -> Self:
        self.seconds = 0.0
        self._calls.clear()
        timed = {function: self._timed(function) for function in _kernels()}
        for name, module in list(sys.modules.items()):
            if not name.startswith("kvtier.") or name.startswith("kvtier.kernels"):
                continue
            for attribute, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in timed:
                    self._undo.append((module, attribute, value))
                    setattr(module, attribute, timed[value])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            setattr(*self._undo.pop())

    def replay(self) -> None:
        """The remembered calls again, on the same views, and nothing else."""
        for function, args, kwargs in self._calls:
            function(*args, **kwargs)

    def calls_by_name(self) -> dict[str, int]:
        """How often each kernel was called since the clock was entered last."""
        return dict(collections.Counter(call.function.__name__ for call in self._calls))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            self._calls.append(_Call(function, args, kwargs))
            return result

        return call


def _kernels() -> set[Callable[..., Any]]:
    """The public functions of all operators."""
    return {getattr(operator, name) for operator in _OPERATORS for name in operator.__all__}
