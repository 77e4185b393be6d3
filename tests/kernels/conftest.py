"""Kernels are tested with scratch memory that starts as NaN in every test."""

from collections.abc import Iterator

import pytest

from kvtier.kernels import scratch


@pytest.fixture(autouse=True)
def fresh_scratch() -> Iterator[None]:
    scratch.release()
    yield
    scratch.release()
