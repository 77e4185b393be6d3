"""What every test stands on: a clean sys.path, poisoned memory, Hypothesis profiles, the gpu mark."""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The checkout root on sys.path would offer `kernels/` to transformers as the Hugging Face package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402 - after sys.path is clean
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Triton decides when it is imported whether kernels are compiled or interpreted on CPU tensors.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

PROFILES = {"fast": 20, "ci": 60, "nightly": 1000}
POISON_LIMIT_BYTES = 64 * 2**20
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)

# Law suites are inherited, so one test function runs under several classes: what differing_executors dislikes.
CALM = [HealthCheck.too_slow, HealthCheck.differing_executors]

for name, max_examples in PROFILES.items():
    settings.register_profile(
        name,
        max_examples=max_examples,
        deadline=None,
        derandomize=name == "ci",
        print_blob=True,
        suppress_health_check=CALM,
    )
settings.load_profile(os.environ.get("KVTIER_HYPOTHESIS_PROFILE", "fast"))
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_report_header() -> str:
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "kvtier"))
    profile = os.environ.get("KVTIER_HYPOTHESIS_PROFILE", "fast")
    return f"{', '.join(versions)}; CUDA {torch.cuda.is_available()}; Hypothesis profile {profile}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an allocator: floating-point memory it hands to kvtier starts as NaN."""

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        ours = caller == "kvtier" or caller.startswith("kvtier.")
        given_or_pinned = kwargs.get("out") is not None or kwargs.get("pin_memory", False)
        if ours and not given_or_pinned and tensor.is_floating_point() and tensor.nbytes <= POISON_LIMIT_BYTES:
            tensor.detach().fill_(float("nan"))
        return tensor

    return empty


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Make a read of memory that kvtier never wrote show up as NaN."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
