"""Every kind of store, for tests of what all of them do."""

from pathlib import Path
from typing import Any

import pytest

from kvtier.testing.stored_prompts import HOST_TIER, nvme_tier


@pytest.fixture(params=["host", "segment", "files", "host+segment", "host+files"])
def store_config(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a store of one tier or two."""
    tiers = [HOST_TIER] if "host" in request.param else []
    backend = request.param.split("+")[-1]
    if backend != "host":
        tiers.append(nvme_tier(tmp_path / "store", backend))
    return {"tiers": tiers, "durability": "relaxed"}
