"""A model directory that the verbs can load: the induction model over a short document with needles."""

from pathlib import Path
from typing import NamedTuple

import pytest

from kvtier.testing.induction import (
    PlantedDocument,
    build_model,
    build_tokenizer,
    plant_needles,
    read_default_document,
    save,
)

CONTEXT = 512


class Saved(NamedTuple):
    """Where the model and the document lie, and what was planted."""

    model: Path
    text: Path
    planted: PlantedDocument


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The model and its document on disk, as a user would have them."""
    directory = tmp_path_factory.mktemp("induction")
    planted = plant_needles(read_default_document(CONTEXT), count=2, context=CONTEXT, values=4)
    tokenizer = build_tokenizer(planted.text)
    model = save(directory / "model", build_model(tokenizer), tokenizer)
    text = directory / "document.txt"
    text.write_text(planted.text, encoding="utf-8")
    return Saved(model, text, planted)
