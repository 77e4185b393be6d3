"""A memory under a model: plain tensors, or the paged core with pages small enough that short prompts fill many."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvtier.config import StoreConfig
from kvtier.core.memory import Memory
from kvtier.integrations.hf.layout import layout_of
from kvtier.integrations.hf.patch import PatchHandle, attach
from kvtier.policies.full import Full
from kvtier.testing.oracles import PlainMemory
from kvtier.types import Budgets

STORE = {"tiers": [{"name": "host", "backend": "host", "capacity": "32MiB"}], "page_tokens": 4, "block_tokens": 8}

Attach = Callable[..., PatchHandle]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small lose more to a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def attached() -> Attach:
    """Put plain sessions under a model; keywords go to the memory."""

    def under(model: Any, **options: Any) -> PatchHandle:
        return attach(model, PlainMemory(layout_of(model), **options))

    return under


def paged(model: Any) -> PatchHandle:
    layout = layout_of(model, page_tokens=4, block_tokens=8)
    return attach(model, Memory(layout, Full(), Budgets(), StoreConfig.model_validate(STORE)))


@pytest.fixture(scope="package", params=["plain", "paged"])
def under_each(request: pytest.FixtureRequest, attached: Attach) -> Attach:
    """Put each kind of memory under a model in turn."""
    return attached if request.param == "plain" else paged
