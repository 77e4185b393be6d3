"""``examples/induction/build.py``: what it writes is a model directory like any other, with the questions beside it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "induction" / "build.py"


def build(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a fresh interpreter."""
    return subprocess.run([sys.executable, "-P", str(SCRIPT), *words], capture_output=True, text=True)


def test_what_it_writes_answers_its_questions(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("The quick brown fox jumps over the lazy dog . " * 60, encoding="utf-8")
    out = tmp_path / "model"
    done = build(str(out), "--document", str(text), "--context", "512", "--needles", "2", "--values", "2")

    assert done.returncode == 0, done.stderr
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    document = (out / "document.txt").read_text(encoding="utf-8")
    questions = json.loads((out / "questions.json").read_text(encoding="utf-8"))
    assert len(questions) == 2
    for asked in questions:
        inputs = tokenizer(f"{document}\n{asked['question']}", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=2)
        assert inputs.input_ids.shape[1] == 512
        assert tokenizer.decode(tokens[0, 512:]) == asked["answer"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a document must hold at least one word"),
        (b"a short text", "a context of 512 tokens needs a document of at least"),
        (b"\xff\xfe\x00", "the document must be UTF-8 text"),
    ],
)
def test_a_document_that_cannot_serve_ends_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    text = tmp_path / "mine.txt"
    text.write_bytes(content)
    done = build(str(tmp_path / "model"), "--document", str(text), "--context", "512")

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()
