"""Run by test_kvikio.py in a process that has kvikio, and a driver or the stand-in for one."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.storage_backends.engines import KvikioEngine, Transfer, choose_engine
from kvtier.testing.engine_laws import EngineFactory, EngineLaws, random_bytes


class TestKvikioEngine(EngineLaws):
    @pytest.fixture
    def engine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EngineFactory:
        # One trial for all examples of a law: it costs a process each.
        trial = KvikioEngine(directory=tmp_path)
        trial.close()
        monkeypatch.setattr("kvtier.storage_backends.engines.kvikio.try_kvikio", lambda *_, **__: trial._trial)
        return KvikioEngine


def test_the_choice_is_kvikio_and_says_in_which_mode(tmp_path: Path) -> None:
    with choose_engine("kvikio", directory=tmp_path) as engine:
        capabilities = engine.capabilities()

    assert capabilities.name == "kvikio"
    assert capabilities.cuda_buffers == torch.cuda.is_available()
    assert capabilities.gpu_direct or "compatibility mode" in capabilities.note
    assert list(tmp_path.iterdir()) == []


def test_what_the_engine_wrote_is_what_kvikio_and_the_system_read(tmp_path: Path) -> None:
    kvikio = importlib.import_module("kvikio")
    sent = random_bytes(1, 3_000_001)
    with KvikioEngine(directory=tmp_path) as engine:
        file = engine.open(tmp_path / "file", writable=True, create=True)
        assert engine.write([Transfer(file, 4099, sent)]) == [None]
        file.sync()
        file.close()
    back = np.zeros(sent.numel(), dtype=np.uint8)
    with kvikio.CuFile(tmp_path / "file", "r") as file:
        assert file.pread(back, file_offset=4099).get() == sent.numel()

    assert back.tobytes() == sent.numpy().tobytes() == (tmp_path / "file").read_bytes()[4099:]
