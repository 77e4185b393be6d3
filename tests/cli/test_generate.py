"""``kvtier generate``: the user's own model under a policy, and every way to ask for what cannot work."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli.main import run
from kvtier.testing.induction import question

POSITIONS = 131072


def words(saved: Any, **changed: object) -> list[str]:
    """A command line that works, with some options set; None leaves an option out, True makes it a flag."""
    options: dict[str, object] = {
        "model": saved.model,
        "document": saved.text,
        "question": question(saved.planted.needles[0]),
        "max-new-tokens": 4,
    }
    options |= {name.replace("_", "-"): value for name, value in changed.items()}
    line = ["generate"]
    for name, value in options.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None:
            line += [f"--{name}", str(value)]
    return line


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one-line error of a command line that must be refused with exit code 2."""
    code = run([*line, "--quiet"])

    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("policy", "budgets"),
    [
        ("full", {}),
        ("full", {"device": "512KiB"}),
        ("quest", {"read": 128}),
        ("snapkv", {"keep": 256}),
        ("adakv", {"keep": 256}),
    ],
)
def test_json_holds_the_answer_and_what_it_took(
    policy: str, budgets: dict[str, object], saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words(saved, policy=policy, json=True, **budgets)) == 0

    summary = json.loads(capsys.readouterr().out)
    assert summary["answer"] == saved.planted.needles[0].answer
    assert summary["policy"] == policy
    assert summary["prompt_tokens"] == saved.planted.context
    assert summary["new_tokens"] == 4
    assert summary["prefill_s"] > 0
    assert summary["decode_tokens_per_s"] > 0
    assert summary["bytes"]["device"] > 0
    assert (summary["bytes"]["host"] > 0) is ("device" in budgets)
    assert summary["report"]["tokens"] >= saved.planted.context


def test_nvme_takes_what_host_memory_cannot(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = words(saved, device="512KiB", host="256KiB", nvme=tmp_path, nvme_capacity="8MiB", json=True)

    assert run(line) == 0

    summary = json.loads(capsys.readouterr().out)
    assert summary["answer"] == saved.planted.needles[0].answer
    assert 0 < summary["bytes"]["host"] <= 2**18
    assert summary["bytes"]["nvme"] > 0


def test_the_next_run_finds_the_document_in_the_store(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(saved, store=tmp_path / "prefixes", store_bytes="64MiB")
    assert run([*line, "--json"]) == 0
    cold = json.loads(capsys.readouterr().out)
    told = subprocess.run([sys.executable, "-m", "kvtier.cli", *line, "--json"], capture_output=True, text=True)
    warm = json.loads(told.stdout)
    assert run([*line, "--quiet"]) == 0
    table = capsys.readouterr().out
    assert run([*line, "--json", "--tenant", "somebody-else"]) == 0
    other = json.loads(capsys.readouterr().out)

    full = saved.planted.context // 256 * 256
    assert cold["answer"] == warm["answer"] == other["answer"] == saved.planted.needles[0].answer
    assert cold["tokens_saved"] == other["tokens_saved"] == 0
    assert cold["report"]["prefix"]["chunks_published"] == full // 256
    assert warm["report"]["prefix"]["tokens_matched"] == full > 0
    assert warm["tokens_saved"] == min(full, saved.planted.context - 1), "the last token is run for its logits"
    assert warm["report"]["prefix"]["first_token_s"] > 0
    assert f"{warm['tokens_saved']} tokens, loaded in" in table
    assert "first token after" in table


def test_a_saved_session_goes_on_in_another_process(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a policy that has evicted by then, and not what the second question is about."""
    file, options = tmp_path / "session.kvs", {"policy": "streamingllm", "keep": 500, "json": True}
    assert run(words(saved, save_session=file, **options)) == 0
    today = json.loads(capsys.readouterr().out)
    later = words(saved, document=None, session=file, question=question(saved.planted.needles[1]), **options)
    told = subprocess.run([sys.executable, "-m", "kvtier.cli", *later], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    tomorrow = json.loads(told.stdout)

    assert today["session_bytes"] == file.stat().st_size
    assert today["answer"] == saved.planted.needles[0].answer
    assert tomorrow["answer"] == saved.planted.needles[1].answer
    assert tomorrow["prompt_tokens"] > today["prompt_tokens"] + today["new_tokens"]
    assert "streamingllm(" in refused(words(saved, document=None, session=file), capsys)


def test_sessions_that_cannot_go_on(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "session.kvs"
    broken.write_bytes(b"no session" * 1000)

    assert "--document" in refused(words(saved, document=None), capsys)
    assert "--document" in refused(words(saved, session=broken), capsys)
    assert "is none" in refused(words(saved, document=None, session=tmp_path / "missing"), capsys)
    assert "--explain" in refused(words(saved, document=None, session=broken, explain=tmp_path / "page.html"), capsys)
    assert "--save-session" in refused(words(saved, save_session=tmp_path), capsys)
    filtered = words(saved, policy="gemfilter", keep=100, save_session=tmp_path / "other.kvs")
    assert "leaves out" in refused(filtered, capsys)
    assert "cannot be restored" in refused(words(saved, document=None, session=broken), capsys)


def test_answer_and_table(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(saved, quiet=True)) == 0

    out, err = capsys.readouterr()
    assert out.startswith(saved.planted.needles[0].answer + "\n")
    assert "KV cache on device, peak" in out
    assert "tokens/s" in out
    assert err == ""


def test_stream_prints_the_answer_once(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(saved, stream=True, quiet=True)) == 0

    out = capsys.readouterr().out
    assert out.count(saved.planted.needles[0].answer) == 1
    assert "KV cache on device, peak" in out


def test_stream_of_a_json_run_goes_to_stderr(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(saved, stream=True, json=True)) == 0

    out, err = capsys.readouterr()
    assert json.loads(out)["answer"] == saved.planted.needles[0].answer
    assert saved.planted.needles[0].answer in err


def test_samples_follow_the_seed(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for _ in range(2):
        assert run(words(saved, sample=True, seed=7, json=True)) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])

    assert answers[0] == answers[1]


def test_a_chat_template_is_used_unless_refused(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "chat"
    shutil.copytree(saved.model, model)
    template = "{% for message in messages %}vault vault {{ message['content'] }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokens = []
    for flags in ([], ["--no-chat-template"]):
        assert run([*words(saved, model=model, json=True), *flags]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["prompt_tokens"])

    # The template brings two words, and not the first token that the tokenizer adds by itself.
    assert tokens == [saved.planted.context + 1, saved.planted.context]


def test_missing_document(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(words(saved, document=tmp_path / "none.txt"), capsys)


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b" \n\t", "empty"), (b"\xff\xfe\x00", "UTF-8")])
def test_document_without_text(
    content: bytes, said: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "document.txt"
    document.write_bytes(content)

    assert said in refused(words(saved, document=document), capsys)


def test_empty_question(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--question" in refused(words(saved, question=" "), capsys)


def test_document_beyond_the_positions_of_the_model(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "long.txt"
    document.write_text("code " * POSITIONS, encoding="utf-8")

    said = refused(words(saved, document=document), capsys)
    assert f"the model has {POSITIONS} positions" in said
    assert f"the prompt is {POSITIONS + 9} tokens" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"policy": "snapkv", "keep": 0}, "keep must be from 1 to the 512 tokens"),
        ({"policy": "snapkv", "keep": 513}, "keep must be from 1 to the 512 tokens"),
        ({"policy": "quest", "read": 513}, "read must be from 1 to the 512 tokens"),
        ({"policy": "quest", "read": 0}, "read must be from 1 to the 512 tokens"),
        ({"policy": "snapkv"}, "snapkv needs keep"),
        ({"policy": "full", "keep": 100}, "keep=100"),
        ({"policy": "qwest"}, "did you mean 'quest'"),
        ({"policy": "snapkv(widow=3)", "keep": 100}, "widow"),
        ({"device": "0"}, "size"),
        ({"device": "lots"}, "lots"),
        ({"device": "1KiB"}, "budget"),
        ({"host": "12 parsecs"}, "parsecs"),
        ({"nvme": "."}, "--nvme-capacity"),
        ({"dtype": "int8"}, "--dtype"),
        ({"max-new-tokens": 0}, "--max-new-tokens"),
    ],
)
def test_what_cannot_work_is_refused(
    changed: dict[str, object], said: str, saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(words(saved, **changed), capsys)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("config.json", "config.json"), ("*.safetensors", "weights"), ("tokenizer.json", "tokenizer")],
)
def test_incomplete_model_directory(
    pattern: str, said: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved.model, model, ignore=shutil.ignore_patterns(pattern))

    assert said in refused(words(saved, model=model), capsys)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_model_directory(name: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved.model, model)
    (model / name).write_bytes(b"{ not what it was")

    assert "cannot be loaded" in refused(words(saved, model=model), capsys)


def test_a_model_that_is_not_there(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "local directory" in refused(words(saved, model="meta-llama/Llama-3.1-8B"), capsys)


def test_full_disk(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more_than_there_is = 2 * shutil.disk_usage(tmp_path).total
    line = words(saved, device="512KiB", nvme=tmp_path, nvme_capacity=more_than_there_is)

    assert str(tmp_path) in refused(line, capsys)


def test_nvme_directory_that_is_not_there(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = words(saved, device="512KiB", nvme=tmp_path / "none", nvme_capacity="8MiB")

    assert str(tmp_path / "none") in refused(line, capsys)
