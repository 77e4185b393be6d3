"""``kvtier generate --explain``: the page holds the document itself, marked, and needs nothing from outside."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.cli.explain_page import render_page
from kvtier.cli.explain_text import pieces_of
from kvtier.cli.explain_views import views_of
from kvtier.cli.main import run
from kvtier.core.explain import LayerExplanation
from kvtier.integrations.hf.explanation import Explanation
from kvtier.testing.induction import question


class Page(HTMLParser):
    """The tags of a page, the text and the marks of its document, and its data."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marks: list[tuple[str, str]] = []
        self.text = self.data = ""
        self._inside: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in ("meta", "br"):
            self._inside.append(given.get("id") or given.get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if "text" in self._inside:
            self.text += data
            if self._inside[-1] != "text":
                self.marks.append((self._inside[-1], data))
        elif self._inside and self._inside[-1] == "data":
            self.data += data


def asked(saved: Any, page: Path, *more: str) -> list[str]:
    needle = question(saved.planted.needles[0])
    line = ["generate", "--model", str(saved.model), "--document", str(saved.text), "--question", needle]
    return [*line, "--max-new-tokens", "4", "--explain", str(page), "--quiet", *more]


@pytest.mark.parametrize(
    ("policy", "views"),
    [
        ("gemfilter(keep=128)", ["prompt filter", "all layers, mean", "layer 0", "layer 1", "layer 2", "layer 3"]),
        ("quest(read=128)", ["all layers, mean", "layer 0", "layer 1", "layer 2", "layer 3"]),
        ("snapkv(keep=128)", ["all layers, mean", "layer 0", "layer 1", "layer 2", "layer 3"]),
    ],
)
def test_the_page_shows_the_document_with_the_needle_marked(
    policy: str, views: list[str], saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "page.html"

    assert run(asked(saved, target, "--policy", policy, "--json")) == 0

    summary = json.loads(capsys.readouterr().out)
    assert summary["explain"] == str(target)
    page = Page(target.read_text(encoding="utf-8"))
    whole = f"{saved.text.read_text(encoding='utf-8')}\n\n{question(saved.planted.needles[0])}"
    assert page.text == whole
    data = json.loads(page.data)
    assert data["text"] == whole
    assert [view["title"] for view in data["views"]] == views
    units = len(whole.encode("utf-16-le")) // 2
    assert all(sum(view["runs"][::2]) == units for view in data["views"])
    assert any(saved.planted.needles[0].answer in " ".join(text.split()) for _, text in page.marks)
    assert 0 < len(page.marks) < 200


def test_nothing_comes_from_outside_and_every_part_has_a_name(saved: Any, tmp_path: Path) -> None:
    target = tmp_path / "page.html"

    assert run(asked(saved, target, "--policy", "snapkv(keep=128)")) == 0

    source = target.read_text(encoding="utf-8")
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [given for _, given in page.tags if given.keys() & {"src", "href", "srcset", "action"}]
    style, script = source.split("<style>")[1].split("</style>")[0], source.rsplit("<script>", 1)[1]
    assert not [word for word in ("url(", "@import", "fetch(", "import(", "http") if word in style + script]
    assert any(given.get("content", "").startswith("default-src 'none'") for tag, given in page.tags if tag == "meta")
    assert ("html", {"lang": "en"}) in page.tags
    regions = [given for _, given in page.tags if given.get("role") in ("region", "img")]
    assert all(given.get("aria-label") or given.get("aria-labelledby") for given in regions)
    strips = [given["aria-label"] for given in regions if given["role"] == "img"]
    assert len(regions) == 1 + len(strips)
    # The mean, four layers, and the two KV heads of each of them.
    assert len([label for label in strips if label and label.startswith("densest at")]) == 5
    assert len([label for label in strips if label and label.startswith("KV head 1: densest at")]) == 4
    assert [given for tag, given in page.tags if tag == "details"] == [{}] * 5


def test_words_are_told_by_the_tokenizer_of_the_model(saved: Any, tmp_path: Path) -> None:
    target = tmp_path / "page.html"

    assert run(asked(saved, target, "--policy", "surprisal(keep=128, unit='word')")) == 0

    page = Page(target.read_text(encoding="utf-8"))
    assert json.loads(page.data)["views"][0]["summary"].startswith("128 of ")


def story(tokens: int, layers: list[LayerExplanation], run_: Any = None) -> Explanation:
    every = np.arange(tokens)
    return Explanation(
        policy="<b>&</b>", token_ids=every, run=every if run_ is None else run_, votes=None, layers=tuple(layers)
    )


def runs(*rows: tuple[int, ...]) -> Any:
    return np.array(rows, dtype=np.int64)


def test_text_of_any_kind_is_shown_and_never_run() -> None:
    pieces = ["</script><script>alert(1)</script>", " 🙂 ", "a\r\nb", '"&amp;', "<!--", "x"]
    layer = LayerExplanation(kept=(runs((1, 3)), runs((1, 2), (4, 6))))

    source = render_page(story(6, [layer]), pieces, "<i>no</i>")

    assert source.count("<script") == source.count("</script>") == 2
    assert "<i>no" not in source
    assert "<b>&" not in source
    page = Page(source)
    assert json.loads(page.data)["text"] == "".join(pieces)
    assert page.text == "".join(pieces)
    assert [name for name, _ in page.marks] == ["l4", "l2", "l2"]
    # UTF-16 units: the smiling face is two.
    assert json.loads(page.data)["views"][0]["runs"] == [34, 0, 4, 4, 4, 2, 6, 0, 5, 2]


def test_shares_are_means_over_heads_and_steps() -> None:
    kept = LayerExplanation(kept=(runs((0, 2)), runs((0, 1))))
    read = LayerExplanation(kept=(runs((0, 4)),), read=(runs((0, 2, 4), (2, 4, 1)), runs((0, 4, 2))), steps=4)

    first, second, third = views_of(story(4, [kept, read]), 4)

    assert (first.title, second.title, third.title) == ("all layers, mean", "layer 0", "layer 1")
    assert second.shares.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert third.shares.tolist() == [0.75, 0.75, 0.375, 0.375]
    assert first.shares.tolist() == [0.875, 0.625, 0.1875, 0.1875]
    assert first.levels.tolist() == [4, 3, 1, 1]
    assert "1 to 2 tokens are held per KV head, and every step reads all" in second.summary
    assert "a decode step read 56.2% of the prompt, mean of 4 steps" in third.summary


def test_layers_of_a_filtered_prompt_are_shown_in_the_whole_prompt() -> None:
    layer = LayerExplanation(kept=(runs((1, 4)),))

    views = views_of(story(6, [layer], np.array([0, 2, 5, 6])), 6)

    assert views[0].shares.tolist() == [1, 0, 1, 0, 0, 1]
    assert views[2].shares.tolist() == [0, 0, 1, 0, 0, 1]


def test_a_long_document_makes_few_elements() -> None:
    tokens = 100_000
    layers = [LayerExplanation(kept=(runs((0, 4), (50_000, 52_000), (99_000, 100_000)),)) for _ in range(32)]

    source = render_page(story(tokens, layers), ["word "] * tokens, "yes")

    assert source.count("<mark") < 20
    assert len(source) < 2 * len("word ") * tokens + 300_000


def test_the_strips_of_heads_are_their_own() -> None:
    read = LayerExplanation(kept=(runs((0, 8)),), read=(runs((0, 4, 4)), runs((4, 8, 1))), steps=4)
    kept = LayerExplanation(kept=(runs((0, 4)),))

    mean, first, second = views_of(story(8, [read, kept]), 8)

    assert mean.heads == second.heads == ()
    assert [head.tolist() for head in first.heads] == [[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4]
    source = render_page(story(8, [read, kept]), list("abcdefgh"), "")
    strips = [given for tag, given in Page(source).tags if given.get("class") == "strip"]
    assert [given["style"] for given in strips[2:4]] == [
        "background:linear-gradient(90deg,var(--s8) 0 50%,var(--s0) 0 100%)",
        "background:linear-gradient(90deg,var(--s0) 0 50%,var(--s2) 0 100%)",
    ]
    assert strips[3]["aria-label"] == "KV head 1: densest at 50% of the prompt, where the share is 25%"
    assert len(strips) == 1 + (1 + 2) + 1


def test_marks_that_are_many_are_coarser() -> None:
    every_second = LayerExplanation(
        kept=(
            np.stack(
                [
                    np.arange(0, 64, 2),
                    np.arange(1, 65, 2),
                ],
                axis=1,
            ),
        )
    )
    (_, view) = views_of(story(64, [every_second]), 64)

    assert view.marked(63)[1] == 1
    assert view.marked(63)[0].tolist() == [4, 0] * 32
    assert view.marked(62)[1] == 2
    assert view.marked(62)[0].tolist() == [4] * 64


def test_a_page_of_32k_tokens_is_bounded_whatever_was_kept() -> None:
    tokens, random = 32_768, np.random.default_rng(0)
    layers = []
    for _ in range(32):
        heads = [np.sort(random.choice(tokens, tokens // 4, replace=False)) for _ in range(8)]
        layers.append(LayerExplanation(kept=tuple(np.stack([head, head + 1], axis=1) for head in heads)))

    source = render_page(story(tokens, layers), ["word "] * tokens, "yes")

    assert "by KV head</summary>" in source
    assert "marked in stretches of 8 tokens" in source
    assert len(source) < 2 * len("word ") * tokens + 1_200_000


def test_the_script_of_the_page_is_one_that_runs(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node to run the script of the page")
    pieces = ["é🙂", " b", "<c>"]
    source = render_page(story(3, [LayerExplanation(kept=(runs((1, 3)),))]), pieces, "")
    script = source.rsplit("<script>", 1)[1].split("</script>")[0]
    stub = """
    const made = {};
    function part(id) { return made[id] ??= { id, listeners: {}, value: 1, textContent: "", children: [],
      addEventListener(kind, act) { this.listeners[kind] = act; },
      replaceChildren(...all) { this.children = all; },
      getElementsByTagName(tag) { return this.children.filter(child => child.tag === tag); } }; }
    const document = { getElementById: part, getElementsByClassName: () => [],
      createElement: tag => ({ tag, focus() { document.focused = this; } }),
      createTextNode: textContent => ({ textContent }) };
    part("data").textContent = DATA;
    """
    show = """
    part("view").listeners.change(); part("next").listeners.click();
    console.log(JSON.stringify([part("text").children.map(child => child.textContent), document.focused.textContent,
      document.focused.className, part("summary").textContent]));
    """
    code = tmp_path / "page.js"
    data = json.dumps(Page(source).data)
    code.write_text("\n".join([stub.replace("DATA", data), script.replace('"use strict";', ""), show]), "utf-8")

    told = subprocess.run([node, str(code)], capture_output=True, text=True, timeout=60)

    assert told.returncode == 0, told.stderr
    shown, focused, level, summary = json.loads(told.stdout)
    assert shown == ["é🙂", " b<c>"]
    assert (focused, level) == (" b<c>", "l4")
    assert summary.startswith("layer 0: 2 tokens are held")


class Words:
    """A tokenizer of words between spaces, with a first token that no text has."""

    def __init__(self, *, fast: bool) -> None:
        self.is_fast = fast

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool) -> dict[str, Any]:
        ids, offsets, at = [], [], 0
        for word in text.split():
            at = text.index(word, at)
            ids.append(len(word))
            offsets.append((at, at + len(word)))
            at += len(word)
        first = [0] if add_special_tokens else []
        return {"input_ids": first + ids, "offset_mapping": [(0, 0)] * len(first) + offsets}

    def decode(self, ids: list[int]) -> str:
        return "w" * ids[0]


@pytest.mark.parametrize("first", [[0], []])
def test_pieces_are_the_text_itself(first: list[int]) -> None:
    text = " one  three\nfifty "

    pieces = pieces_of(Words(fast=True), text, torch.tensor([*first, 3, 5, 5]))

    assert pieces == [""] * 0 + ([" "] if first else []) + [
        *([" one  "] if not first else ["one  "]),
        "three\n",
        "fifty ",
    ]


def test_pieces_of_a_tokenizer_that_cannot_say_where() -> None:
    assert pieces_of(Words(fast=False), "one three", torch.tensor([3, 5])) == ["www", "wwwww"]


@pytest.mark.parametrize("place", ["missing/page.html", "."])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    place: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(asked(saved, tmp_path / place)) == 2
    assert "--explain must be a file in a folder that exists" in capsys.readouterr().err
