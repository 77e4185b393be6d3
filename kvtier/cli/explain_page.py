"""The page of ``kvtier generate --explain``: one HTML file for eyes, screen readers and keyboards, no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from itertools import pairwise
from string import Template
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvtier.cli.explain_template import PAGE
from kvtier.cli.explain_views import View, views_of
from kvtier.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.integrations.hf.explanation import Explanation

__all__ = ["render_page", "write_page"]

_STRIP: Final = 100
"""Stretches of the prompt in the strip of a layer."""
_PASSAGES: Final = 200
"""Passages at most that are listed as text."""


def write_page(path: Path, explanation: Explanation, pieces: Sequence[str], answer: str) -> None:
    """Write the page of a prompt, of which ``pieces`` are the tokens as text.

    Raises
    ------
    InputError
        When the file cannot be written.
    """
    try:
        path.write_text(render_page(explanation, pieces, answer), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot write the page {path}: {error.strerror}") from error


def render_page(explanation: Explanation, pieces: Sequence[str], answer: str) -> str:
    """The whole page."""
    views = views_of(explanation, len(pieces))
    data = {"text": "".join(pieces), "views": [_data(view, pieces) for view in views]}
    first = views[0]
    return Template(PAGE).substitute(
        policy=html.escape(explanation.policy),
        tokens=len(pieces),
        answer=html.escape(answer),
        summary=html.escape(first.summary),
        options="".join(f'<option value="{at}">{html.escape(view.title)}</option>' for at, view in enumerate(views)),
        document="".join(_spans(first, pieces)),
        rows="".join(map(_row, views)),
        passages="".join(_passages(first, pieces)),
        # Inside a script only "<" could end it or open a comment.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _stretches(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """First, one past the last, and level of each stretch of equal levels."""
    if not len(levels):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(levels)]
    return [(start, stop, int(levels[start])) for start, stop in pairwise(cuts)]


def _data(view: View, pieces: Sequence[str]) -> dict[str, Any]:
    """A view for the script: UTF-16 lengths and levels of its stretches, one after the other."""
    flat: list[int] = []
    for start, stop, level in _stretches(view.levels.tolist()):
        text = "".join(pieces[start:stop])
        flat += [len(text.encode("utf-16-le", errors="surrogatepass")) // 2, level]
    return {"title": view.title, "summary": view.summary, "runs": flat}


def _spans(view: View, pieces: Sequence[str]) -> list[str]:
    """The document, its stretches marked."""
    spans = []
    for start, stop, level in _stretches(view.levels.tolist()):
        text = html.escape("".join(pieces[start:stop]))
        spans.append(f'<mark class="l{level}">{text}</mark>' if level else text)
    return spans


def _passages(view: View, pieces: Sequence[str]) -> list[str]:
    """The marked stretches as a list, without the document around them."""
    marked = [run for run in _stretches((view.levels > 0).astype(int).tolist()) if run[2]]
    items = [
        f"<li>tokens {start} to {stop - 1}: <q>{html.escape(''.join(pieces[start:stop]).strip())}</q></li>"
        for start, stop, _ in marked[:_PASSAGES]
    ]
    if len(marked) > _PASSAGES:
        items.append(f"<li>and {len(marked) - _PASSAGES} more</li>")
    return items


def _row(view: View) -> str:
    """A row of the table: the view, its sentence, and where in the prompt it keeps or reads."""
    parts = np.array_split(view.shares, min(_STRIP, max(1, len(view.shares))))
    means = [float(part.mean()) if len(part) else 0.0 for part in parts]
    width = 1 / len(means)
    stops = ",".join(
        f"rgb(var(--mark) / {mean:.2f}) {at * width:.2%} {(at + 1) * width:.2%}" for at, mean in enumerate(means)
    )
    best = int(np.argmax(means))
    told = f"densest at {best * width:.0%} of the prompt, where the share is {means[best]:.0%}"
    return (
        f'<tr><th scope="row">{html.escape(view.title)}</th><td>{html.escape(view.summary)}</td>'
        f'<td><div class="strip" role="img" aria-label="{told}" style="background:linear-gradient(90deg,{stops})">'
        "</div></td></tr>"
    )
