"""What ``kvtier doctor`` asks the installed software: versions, the kernels in use, a shadowed package."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import Final

from kvtier.cli.doctor_check import Check, Probe
from kvtier.errors import ConfigError

__all__ = ["SOFTWARE_PROBES"]

_PYTHON: Final = (3, 11)
_TORCH: Final = "2.6"
_TRANSFORMERS: Final = ("5.16", "5.23")


def _installed(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python(name: str, directory: Path) -> Check:
    detail = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < _PYTHON:
        return Check(name, "FAIL", detail, "use Python 3.11 or newer")
    return Check(name, "PASS", detail)


def _platform(name: str, directory: Path) -> Check:
    detail = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() != "Linux":
        return Check(name, "WARN", detail, "kvtier is tested on Linux; O_DIRECT and pinned memory may be missing here")
    return Check(name, "PASS", detail)


def _torch(name: str, directory: Path) -> Check:
    from packaging.version import Version

    found = _installed("torch")
    if found is None:
        return Check(name, "FAIL", "not installed", "pip install torch")
    torch = importlib.import_module("torch")
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if Version(found) < Version(_TORCH):
        return Check(name, "FAIL", detail, f"pip install 'torch>={_TORCH}'")
    return Check(name, "PASS", detail)


def _triton(name: str, directory: Path) -> Check:
    import torch

    found = _installed("triton")
    if found is not None:
        importlib.import_module("triton")
        return Check(name, "PASS", found)
    if torch.cuda.is_available():
        return Check(name, "WARN", "not installed: the GPU runs the plain torch kernels", "pip install triton")
    return Check(name, "PASS", "not installed; only used on a GPU")


def _transformers(name: str, directory: Path) -> Check:
    from packaging.version import Version

    oldest, newest = _TRANSFORMERS
    found = _installed("transformers")
    if found is None:
        fix = f"pip install 'transformers>={oldest}' to use kvtier.patch, generate and demo"
        return Check(name, "WARN", "not installed", fix)
    if not Version(oldest) <= Version(".".join(found.split(".")[:2])) <= Version(newest):
        fix = f"install a tested version: {oldest} to {newest}"
        return Check(name, "WARN", f"{found}, outside the tested range {oldest} to {newest}", fix)
    return Check(name, "PASS", f"{found}, in the tested range {oldest} to {newest}")


def _shadowed_kernels(name: str, directory: Path) -> Check:
    """Whether ``import kernels`` finds a checkout of kvtier in place of the Hugging Face package of that name."""
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        return Check(name, "PASS", "nothing shadows it; the Hugging Face package is not installed")
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    ours = [place for place in places if (place.parent / "kvtier").is_dir() and (place.parent / "policies").is_dir()]
    if not ours:
        return Check(name, "PASS", f"the Hugging Face package, {_installed('kernels') or 'version unknown'}")
    detail = f"`import kernels` finds the checkout {ours[0]}"
    fix = "take the checkout off PYTHONPATH, and start python elsewhere or with PYTHONSAFEPATH=1"
    if _installed("kernels") is not None:
        return Check(name, "FAIL", f"{detail}, not the installed Hugging Face package: transformers breaks", fix)
    return Check(name, "WARN", f"{detail}; harmless until the Hugging Face package is installed", fix)


def _dispatch(name: str, directory: Path) -> Check:
    import torch

    from kvtier.kernels import dispatch

    try:
        chosen = dispatch.chosen("cuda" if torch.cuda.is_available() else "cpu")
    except ConfigError as error:
        return Check(name, "FAIL", str(error), f"unset {dispatch.ENVIRONMENT_VARIABLE}")
    return Check(name, "PASS", str(chosen))


SOFTWARE_PROBES: Final = (
    Probe("python", _python),
    Probe("platform", _platform),
    Probe("torch", _torch),
    Probe("triton", _triton),
    Probe("transformers", _transformers),
    Probe("kernels package", _shadowed_kernels),
    Probe("kernel dispatch", _dispatch),
)
