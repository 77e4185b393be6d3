"""A clock around kernels: how long the kernel calls of a step take, and the same calls again without the session.

A kernel is a public function of an operator in ``kvtier.kernels``: everything from its call to its return, the check of
its arguments and its own Python included.
"""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import Any, Final, TypeAlias

from kvtier.kernels import (
    column_sums,
    gather_attention,
    merge_partials,
    page_scores,
    page_summaries,
    ranked_attention,
    top_pages,
    weighed_attention,
)

__all__ = ["Kernel", "KernelClock", "KernelSwitch"]

_OPERATORS: Final = (
    column_sums,
    gather_attention,
    merge_partials,
    page_scores,
    page_summaries,
    ranked_attention,
    top_pages,
    weighed_attention,
)

Kernel: TypeAlias = Callable[..., Any]


class KernelSwitch:
    """Puts something around every kernel that is called from outside the kernels, and takes it away again.

    Parameters
    ----------
    around : callable
        From a kernel to the function that stands in its place, in whatever module of kvtier holds it, while ``on``.
    """

    def __init__(self, around: Callable[[Kernel], Kernel]) -> None:
        replaced = {kernel: wraps(kernel)(around(kernel)) for kernel in _kernels()}
        self._places = [
            (module, attribute, value, replaced[value])
            for name, module in list(sys.modules.items())
            if name.startswith("kvtier.") and not name.startswith("kvtier.kernels")
            for attribute, value in list(vars(module).items())
            if isinstance(value, FunctionType) and value in replaced
        ]

    @contextmanager
    def on(self) -> Iterator[None]:
        """While entered, calls go through what was put around."""
        for module, attribute, _, replacement in self._places:
            setattr(module, attribute, replacement)
        try:
            yield
        finally:
            for module, attribute, kernel, _ in self._places:
                setattr(module, attribute, kernel)


class KernelClock(KernelSwitch):
    """Times and remembers every kernel call while it is on.

    The clock's own cost, a fraction of a microsecond a call, counts as session.

    Attributes
    ----------
    seconds : float
        Spent in kernels since ``restart``.
    """

    def __init__(self) -> None:
        super().__init__(self._timed)
        self.seconds = 0.0
        self._calls: list[tuple[Kernel, tuple[Any, ...], dict[str, Any]]] = []

    def restart(self) -> None:
        """Forget what was timed and remembered."""
        self.seconds = 0.0
        self._calls.clear()

    def replay(self) -> None:
        """The remembered calls again, on the same views, and nothing else."""
        for kernel, args, kwargs in self._calls:
            kernel(*args, **kwargs)

    def calls_by_name(self) -> dict[str, int]:
        """How often each kernel was called since ``restart``."""
        return dict(collections.Counter(kernel.__name__ for kernel, _, _ in self._calls))

    def _timed(self, kernel: Kernel) -> Kernel:
        now = time.perf_counter

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((kernel, args, kwargs))
            started = now()
            result = kernel(*args, **kwargs)
            self.seconds += now() - started
            return result

        return call


def _kernels() -> set[Kernel]:
    """The public functions of all operators."""
    return {getattr(operator, name) for operator in _OPERATORS for name in operator.__all__}
