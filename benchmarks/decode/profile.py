"""Where a session's own time goes: functions outside the kernels, by cProfile."""

from __future__ import annotations

import cProfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, Final, NamedTuple, TypeGuard

import kvtier
from benchmarks.peers.tiered import TieredLayers

__all__ = ["profile"]

_TOP: Final = 15
_ROOT: Final = Path(kvtier.__file__).resolve().parent.parent
_KERNELS: Final = _ROOT / "kernels"
_LIBRARIES: Final = "site-packages"


class _Spent(NamedTuple):
    calls: int = 0
    seconds: float = 0.0


def profile(held: TieredLayers, steps: int, *, between: Callable[[], object]) -> list[dict[str, Any]]:
    """Functions with the most time of their own, in microseconds per layer and step; the profiler itself adds some.

    Left out is what runs inside kernels. A built-in is told apart by the function that calls it.

    Parameters
    ----------
    between : callable
        Called before each step: it empties the caches, as before a timed step.
    """
    profiler = cProfile.Profile()
    for _ in range(steps):
        tokens = held.tokens()
        between()
        profiler.enable()
        held.step(tokens)
        profiler.disable()
    spent: dict[str, _Spent] = defaultdict(_Spent)
    for name, calls, seconds in _outside_kernels(profiler):
        spent[name] = _Spent(spent[name].calls + calls, spent[name].seconds + seconds)
    each = 1 / (steps * held.layers)
    most = sorted(spent.items(), key=lambda item: -item[1].seconds)[:_TOP]
    return [{"function": name, "calls": each * own.calls, "own_us": each * own.seconds * 1e6} for name, own in most]


def _outside_kernels(profiler: cProfile.Profile) -> Iterator[tuple[str, int, float]]:
    """Name, calls and seconds of kvtier's functions by themselves, and of what each of them calls elsewhere, whole."""
    for entry in profiler.getstats():
        if not _is_session(entry.code):
            continue
        name = _readable(entry.code)
        yield name, entry.callcount, entry.inlinetime
        for called in entry.calls or ():
            if not _is_ours(called.code):
                yield f"{_readable(called.code)} in {name}", called.callcount, called.totaltime


def _is_ours(code: CodeType | str) -> bool:
    if isinstance(code, str) or code.co_filename.startswith("<"):
        return False
    path = Path(code.co_filename).resolve()
    # An environment may lie within the checkout.
    return path.is_relative_to(_ROOT) and _LIBRARIES not in path.relative_to(_ROOT).parts


def _is_session(code: CodeType | str) -> TypeGuard[CodeType]:
    return _is_ours(code) and not Path(code.co_filename).resolve().is_relative_to(_KERNELS)


def _readable(code: CodeType | str) -> str:
    """A function with its file, as seen from the checkout or from site-packages; a built-in has none."""
    if isinstance(code, str):
        return code.strip("<>")
    path = Path(code.co_filename).resolve()
    shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(path.parent.name, path.name)
    return f"{shown}:{code.co_firstlineno} {code.co_qualname}"
