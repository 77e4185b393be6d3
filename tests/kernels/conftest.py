"""Kernels are tested on one thread, with scratch memory that starts as NaN in every test."""

from collections.abc import Iterator

import pytest
import torch

from kvtier.kernels import scratch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny: on a busy machine threads would spend minutes waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_scratch() -> Iterator[None]:
    scratch.release()
    yield
    scratch.release()
