"""The pytest plugin of kvtier: markers of the law suites. Loaded in every run, so it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

__all__ = ["pytest_configure"]


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that the suites set."""
    config.addinivalue_line("markers", "law(code): a law of kvtier.testing; select one with -m 'law(code=\"S1\")'")
