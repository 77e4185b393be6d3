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

    from kvtier.cli.explain_views import Shares
    from kvtier.core.policy import IntArray
    from kvtier.integrations.hf.explanation import Explanation

__all__ = ["render_page", "write_page"]

_STRIP: Final = 100
"""Stretches of the prompt in the strip of a layer."""
_HEAD_STRIP: Final = (16, 50)
"""Least and most of them in the strip of a KV head."""
_HEAD_STRIPS: Final = 16_000
"""Stretches in the strips of all heads together, as long as each has its least."""
_MARKS: Final = 100_000
"""Times that marks may begin or end in all views together."""
_SHADES: Final = 8
"""Steps of colour in a strip."""
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
    most = _MARKS // len(views)
    data = {"text": "".join(pieces), "views": [_data(view, pieces, most) for view in views]}
    first, heads = views[0], sum(len(view.heads) for view in views)
    marks, _ = first.marked(most)
    return Template(PAGE).substitute(
        policy=html.escape(explanation.policy),
        tokens=len(pieces),
        answer=html.escape(answer),
        summary=html.escape(_summary(first, most)),
        options="".join(f'<option value="{at}">{html.escape(view.title)}</option>' for at, view in enumerate(views)),
        document="".join(_spans(marks, pieces)),
        shades=" ".join(f"--s{shade}: rgb(var(--mark) / {shade / _SHADES:g});" for shade in range(_SHADES + 1)),
        rows="".join(_row(view, heads) for view in views),
        passages="".join(_passages(marks, pieces)),
        # Inside a script only "<" could end it or open a comment.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _stretches(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """First, one past the last, and level of each stretch of equal levels."""
    if not len(levels):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(levels)]
    return [(start, stop, int(levels[start])) for start, stop in pairwise(cuts)]


def _summary(view: View, most: int) -> str:
    """The sentence of a view, and how coarse its marks are."""
    _, together = view.marked(most)
    return view.summary if together == 1 else f"{view.summary}; marked in stretches of {together} tokens"


def _data(view: View, pieces: Sequence[str], most: int) -> dict[str, Any]:
    """A view for the script: UTF-16 lengths and levels of its stretches, one after the other."""
    flat: list[int] = []
    for start, stop, level in _stretches(view.marked(most)[0].tolist()):
        text = "".join(pieces[start:stop])
        flat += [len(text.encode("utf-16-le", errors="surrogatepass")) // 2, level]
    return {"title": view.title, "summary": _summary(view, most), "runs": flat}


def _spans(levels: IntArray, pieces: Sequence[str]) -> list[str]:
    """The document, its stretches marked."""
    spans = []
    for start, stop, level in _stretches(levels.tolist()):
        text = html.escape("".join(pieces[start:stop]))
        spans.append(f'<mark class="l{level}">{text}</mark>' if level else text)
    return spans


def _passages(levels: IntArray, pieces: Sequence[str]) -> list[str]:
    """The marked stretches as a list, without the document around them."""
    marked = [run for run in _stretches((levels > 0).astype(int).tolist()) if run[2]]
    items = [
        f"<li>tokens {start} to {stop - 1}: <q>{html.escape(''.join(pieces[start:stop]).strip())}</q></li>"
        for start, stop, _ in marked[:_PASSAGES]
    ]
    if len(marked) > _PASSAGES:
        items.append(f"<li>and {len(marked) - _PASSAGES} more</li>")
    return items


def _row(view: View, heads: int) -> str:
    """A row of the table: the view, its sentence, where in the prompt it keeps or reads, and each of its heads."""
    least, most = _HEAD_STRIP
    cells = max(least, min(most, _HEAD_STRIPS // max(1, heads)))
    strips = "".join(f"<li>{_strip(shares, cells, f'KV head {at}: ')}</li>" for at, shares in enumerate(view.heads))
    own = f'<details><summary>by KV head</summary><ol start="0">{strips}</ol></details>' if strips else ""
    return (
        f'<tr><th scope="row">{html.escape(view.title)}</th><td>{html.escape(view.summary)}</td>'
        f"<td>{_strip(view.shares, _STRIP)}{own}</td></tr>"
    )


def _strip(shares: Shares, cells: int, whose: str = "") -> str:
    """A strip from the beginning of the prompt to its end, darker where more was kept or read, in so many ``cells``."""
    means = [float(part.mean()) for part in np.array_split(shares, min(cells, max(1, len(shares)))) if len(part)] or [
        0.0
    ]
    # Rounded up: what was kept or read anywhere is never without colour.
    shades = [int(np.ceil(mean * _SHADES - 1e-6)) for mean in means]
    # A stop that begins at 0 begins where the one before it ends.
    stops = ",".join(f"var(--s{shade}) 0 {100 * stop / len(means):.4g}%" for _, stop, shade in _stretches(shades))
    best = int(np.argmax(means))
    told = f"{whose}densest at {best / len(means):.0%} of the prompt, where the share is {means[best]:.0%}"
    return f'<div class="strip" role="img" aria-label="{told}" style="background:linear-gradient(90deg,{stops})"></div>'
