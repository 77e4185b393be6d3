"""``kvtier doctor``: every probe guarded, every fault with its fix."""

import errno
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvtier.cli import doctor_machine, doctor_software
from kvtier.cli.doctor_check import Check, Probe, run_probe
from kvtier.cli.main import run

PROBES = (*doctor_software.SOFTWARE_PROBES, *doctor_machine.MACHINE_PROBES)


def look(name: str, directory: Path) -> Check:
    """What the probe of that name finds."""
    (probe,) = [probe for probe in PROBES if probe.name == name]
    return run_probe(probe, directory)


def versions(**changed: str | None) -> Callable[[str], str]:
    """A stand-in for ``importlib.metadata.version``; None is a package that is not there."""
    real = importlib.metadata.version

    def version(package: str) -> str:
        found = changed.get(package, "") if package in changed else real(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    return version


def fake_kvikio(directory: Path, body: str) -> None:
    """A package that the probe's process imports in place of kvikio."""
    package = directory / "kvikio"
    package.mkdir()
    (package / "__init__.py").write_text(body, encoding="utf-8")


def test_json_is_one_object_with_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["doctor", "--json", "--path", str(tmp_path)])

    report = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in report["checks"]] == [probe.name for probe in PROBES]
    assert all(check["status"] in {"PASS", "WARN", "FAIL"} for check in report["checks"])
    assert all(check["fix"] for check in report["checks"] if check["status"] != "PASS")
    assert report["ok"] is (code == 0)
    assert list(tmp_path.iterdir()) == []


def test_table_shows_names_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--path", str(tmp_path)])

    out = capsys.readouterr().out
    assert "PASS" in out
    assert all(name in out for name in ("python", "torch", "O_DIRECT", "kvikio"))


@pytest.mark.parametrize("error", [RuntimeError("driver\nexploded"), ImportError("half installed"), SystemExit(3)])
def test_a_probe_that_raises_is_a_warning(error: BaseException, tmp_path: Path) -> None:
    def explode(name: str, directory: Path) -> Check:
        raise error

    check = run_probe(Probe("thing", explode), tmp_path)

    assert check.status == "WARN"
    assert type(error).__name__ in check.detail
    assert "\n" not in check.detail


def test_doctor_reports_when_every_probe_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(name: str, directory: Path) -> Check:
        raise OSError(errno.EIO, f"{name} is on fire")

    for module, group in ((doctor_software, "SOFTWARE_PROBES"), (doctor_machine, "MACHINE_PROBES")):
        monkeypatch.setattr(module, group, tuple(Probe(probe.name, explode) for probe in getattr(module, group)))

    assert run(["doctor", "--json", "--path", str(tmp_path)]) == 0

    report = json.loads(capsys.readouterr().out)
    assert [check["status"] for check in report["checks"]] == ["WARN"] * len(PROBES)


def test_one_failure_makes_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))

    assert run(["doctor", "--json", "--path", str(tmp_path)]) == 1

    report = json.loads(capsys.readouterr().out)
    failed = [check for check in report["checks"] if check["status"] == "FAIL"]
    assert report["ok"] is False
    assert [check["name"] for check in failed] == ["free space"]
    assert "1.0 MiB" in failed[0]["detail"]


@pytest.mark.parametrize(("free", "status"), [(2**20, "FAIL"), (2 * 2**30, "WARN"), (2**40, "PASS")])
def test_free_space(free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    assert look("free space", tmp_path).status == status


def test_a_directory_to_be_made_is_judged_by_its_parent(tmp_path: Path) -> None:
    assert doctor_machine.existing_directory(tmp_path / "not" / "yet") == tmp_path
    assert str(tmp_path) in look("free space", tmp_path / "not" / "yet").detail


def test_direct_io_works_or_says_why(tmp_path: Path) -> None:
    check = look("O_DIRECT", tmp_path)

    assert check.status in {"PASS", "WARN"}
    assert str(tmp_path) in check.detail


def test_refused_direct_io_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flag: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(doctor_machine, "_round_trip", refuse)

    check = look("O_DIRECT", tmp_path)
    assert (check.status, "Invalid argument" in check.detail) == ("WARN", True)
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_direct_io_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)

    assert look("O_DIRECT", tmp_path).status == "WARN"


def test_a_directory_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)

    check = look("O_DIRECT", tmp_path)
    assert check.status == "FAIL"
    assert "Read-only file system" in check.detail


@pytest.mark.parametrize(
    ("found", "status"),
    [("5.15.2", "WARN"), ("5.16.0", "PASS"), ("5.23.4", "PASS"), ("5.24.0", "WARN"), ("6.0.0", "WARN"), (None, "WARN")],
)
def test_transformers_range(found: str | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions(transformers=found))

    assert look("transformers", tmp_path).status == status


@pytest.mark.parametrize(("found", "status"), [(None, "FAIL"), ("2.4.1", "FAIL"), ("2.13.0+cpu", "PASS")])
def test_torch_version(found: str | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions(torch=found))

    assert look("torch", tmp_path).status == status


def test_missing_triton_matters_only_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions(triton=None))

    for gpu, status in ((False, "PASS"), (True, "WARN")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert look("triton", tmp_path).status == status


def test_refused_pinned_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("out of page-locked memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refuse)

    check = look("pinned memory", tmp_path)
    assert check.status == "WARN"
    assert "out of page-locked memory" in check.detail


@pytest.mark.parametrize(("package", "status"), [(None, "WARN"), ("0.10.0", "FAIL")])
def test_a_checkout_that_shadows_kernels_is_found(
    package: str | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kernels", "kvtier", "policies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", versions(kernels=package))

    check = look("kernels package", tmp_path)
    assert check.status == status
    assert str(tmp_path / "kernels") in check.detail
    assert "PYTHONSAFEPATH" in check.fix


def test_another_package_named_kernels_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "kernels", raising=False)

    assert look("kernels package", tmp_path).status == "PASS"


def test_kernels_in_use_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVTIER_KERNELS", raising=False)

    check = look("kernel dispatch", tmp_path)
    assert check.status == "PASS"
    assert "gather_attention" in check.detail


def test_kernels_that_do_not_exist_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_KERNELS", "florp")

    check = look("kernel dispatch", tmp_path)
    assert (check.status, check.fix) == ("FAIL", "unset KVTIER_KERNELS")
    assert "florp" in check.detail


def test_kvikio_forced_out_of_compatibility_mode_fails_without_being_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kvikio(tmp_path, "raise AssertionError('must not be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("KVIKIO_COMPAT_MODE", "OFF")

    check = look("kvikio", tmp_path)
    assert check.status == "FAIL"
    assert check.fix == "unset KVIKIO_COMPAT_MODE"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ImportError('libkvikio.so: cannot open shared object file')", "libkvikio.so"),
        ("import os; os._exit(139)", "exit code 139"),
        ("import time; time.sleep(600)", "no answer"),
    ],
)
def test_a_kvikio_that_raises_dies_or_hangs_is_a_warning(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kvikio(tmp_path, body)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("KVIKIO_COMPAT_MODE", raising=False)
    monkeypatch.setattr(doctor_machine, "_KVIKIO_SECONDS", 2.0)

    check = look("kvikio", tmp_path)
    assert check.status == "WARN"
    assert said in check.detail


@pytest.mark.parametrize(("available", "status"), [("True", "PASS"), ("False", "WARN")])
def test_a_kvikio_that_works_reports_its_mode(
    available: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kvikio(tmp_path, FILE_COPYING_KVIKIO)
    (tmp_path / "kvikio" / "defaults.py").write_text(
        "import enum\nMode = enum.Enum('Mode', 'ON OFF AUTO')\ndef get(name): return Mode.AUTO\n", encoding="utf-8"
    )
    (tmp_path / "kvikio" / "cufile_driver.py").write_text(f"def get(name): return {available}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("KVIKIO_COMPAT_MODE", raising=False)

    check = look("kvikio", tmp_path)
    assert check.status == status
    assert check.detail.startswith("26.10.00, ")
    assert "compat_mode AUTO" in check.detail


def test_the_engine_in_use_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    check = look("I/O engine", tmp_path)
    assert (check.status, check.detail) == ("PASS", "posix: no GPU that kvikio could serve")


FILE_COPYING_KVIKIO = """
__version__ = "26.10.00"

class CuFile:
    def __init__(self, path, flags):
        self.file = open(path, flags + "b")
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, buffer):
        return self.file.write(buffer)
    def read(self, buffer):
        return self.file.readinto(buffer)
"""
