"""transformers, for the verbs that run a model: imported when it is needed, and no louder than the verb itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvtier.errors import MissingDependencyError

if TYPE_CHECKING:
    from kvtier.cli.output import Screen

__all__ = ["quiet_transformers", "transformers_module"]


def transformers_module() -> Any:
    """The package.

    Raises
    ------
    MissingDependencyError
        When it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"this verb needs transformers ({error}); pip install 'kvtier[hf]'") from error
    return transformers


@contextlib.contextmanager
def quiet_transformers(screen: Screen) -> Iterator[None]:
    """No bars of its own where the verb draws none, and its advice only to those who debug; as before, afterwards."""
    log = transformers_module().utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    if not screen.bars:
        log.disable_progress_bar()
    if not screen.debug:
        log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
