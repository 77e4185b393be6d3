"""The Triton kernels run on the GPU where there is one, else in Triton's interpreter; memory around the data is NaN."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small problems as a large GPU would cut large ones."""
    from kvtier.kernels.gather_attention import triton
    from kvtier.kernels.gather_attention.table import SPLITS

    monkeypatch.setattr(triton, "SPLITS", SPLITS._replace(least_keys=40))
    monkeypatch.setattr(triton, "processors", lambda _: 64)
