"""A memory under a model, for tests that do not care which."""

from collections.abc import Callable
from typing import Any

import pytest

from kvtier.integrations.hf.layout import layout_of
from kvtier.integrations.hf.patch import PatchHandle, attach
from kvtier.testing.oracles import PlainMemory

Attach = Callable[..., PatchHandle]


@pytest.fixture
def attached() -> Attach:
    """Put plain sessions under a model; keywords go to the memory."""

    def under(model: Any, **options: Any) -> PatchHandle:
        return attach(model, PlainMemory(layout_of(model), **options))

    return under
