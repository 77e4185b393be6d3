"""The kvikio engine: the real library in a process of its own, and what happens where kvikio is missing or broken."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvtier.errors import ConfigError, MissingDependencyError, StorageError
from kvtier.storage_backends.engines import KvikioEngine, choose_engine
from kvtier.storage_backends.engines.kvikio_trial import KvikioTrial, try_kvikio


def fake_kvikio(directory: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that this process finds, and the process of the trial imports, in place of kvikio."""
    (directory / "kvikio").mkdir()
    (directory / "kvikio" / "__init__.py").write_text(body, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(directory), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(directory))
    monkeypatch.delenv("KVIKIO_COMPAT_MODE", raising=False)


def without_kvikio(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "kvikio" else real(name, *rest)
    )


def test_the_real_kvikio_keeps_the_laws(tmp_path: Path, kvikio_environment: dict[str, str]) -> None:
    script = Path(__file__).with_name("kvikio_process.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'run'}", script]

    done = subprocess.run(command, env=kvikio_environment, capture_output=True, text=True, timeout=250)

    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_without_kvikio_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kvikio(monkeypatch)

    with pytest.raises(MissingDependencyError, match="pip install kvikio-cu13"):
        KvikioEngine()
    with choose_engine("kvikio") as engine:
        assert engine.capabilities().name == "posix"
        assert "in place of kvikio" in engine.capabilities().note
        assert "pip install kvikio-cu13" in engine.capabilities().note


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ImportError('libkvikio.so: cannot open shared object file')", "libkvikio.so"),
        ("import os; os._exit(139)", "exit code 139"),
        ("import time; time.sleep(600)", "no answer in 2 s"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_broken_kvikio_is_found_out_in_another_process(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kvikio(tmp_path, body, monkeypatch)

    trial = try_kvikio(tmp_path, cuda=False, seconds=2)

    assert not trial.usable
    assert said in trial.reason
    assert "kvikio" not in sys.modules


def test_a_trial_that_fails_is_an_error_or_the_posix_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kvikio(tmp_path, "raise OSError('broken driver')", monkeypatch)

    with pytest.raises(StorageError, match="broken driver; use the posix engine"):
        KvikioEngine(directory=tmp_path)
    with choose_engine("kvikio", directory=tmp_path) as engine:
        assert engine.capabilities().name == "posix"
        assert "broken driver" in engine.capabilities().note


def test_kvikio_forced_out_of_compatibility_mode_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kvikio(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')", monkeypatch)
    monkeypatch.setenv("KVIKIO_COMPAT_MODE", "off")

    trial = try_kvikio(tmp_path, cuda=False)

    assert "KVIKIO_COMPAT_MODE=OFF" in trial.reason
    assert not (tmp_path / "ran").exists()


def test_the_trial_with_the_real_kvikio_reports_its_mode(
    tmp_path: Path, kvikio_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, kvikio_environment.get(name, ""))
    monkeypatch.delenv("KVIKIO_COMPAT_MODE", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, kvikio_environment.get("PYTHONPATH", "")])
    (tmp_path / "files").mkdir()

    trial = try_kvikio(tmp_path / "files", cuda=torch.cuda.is_available())

    assert trial.usable, trial.reason
    assert trial.version
    assert trial.cuda == torch.cuda.is_available()
    assert trial.gpu_direct or "compatibility mode" in trial.mode
    assert list((tmp_path / "files").iterdir()) == []


def test_only_direct_transfers_are_called_direct() -> None:
    assert KvikioTrial(usable=True, gpu_direct=True).mode == "GPUDirect Storage"
    assert "through host memory" in KvikioTrial(usable=True).mode


def test_without_a_gpu_the_choice_is_posix_and_kvikio_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with choose_engine() as engine:
        assert (engine.capabilities().name, engine.capabilities().note) == ("posix", "no GPU that kvikio could serve")


def test_with_a_gpu_and_no_kvikio_the_choice_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    without_kvikio(monkeypatch)
    with choose_engine() as engine:
        assert engine.capabilities().name == "posix"
        assert "through host memory" in engine.capabilities().note


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown I/O engine 'uring'; known: auto, posix, kvikio"):
        choose_engine("uring")
