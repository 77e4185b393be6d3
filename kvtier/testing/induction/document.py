"""Real long text with facts planted in it, in the manner of needle-in-a-haystack tests. Standard library only."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import InputError
from kvtier.testing.induction.words import NEEDLE_KEYS, NEEDLE_VALUES, split_words

__all__ = ["FRAME_WORDS", "Needle", "PlantedDocument", "plant_needles", "question", "read_default_document"]

_QUESTION = "Question : which code opens the vault {key}"
_SENTENCE = "The vault {key} {values} ."
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})

FRAME_WORDS = tuple(sorted({word for frame in (_QUESTION, _SENTENCE) for word in frame.split() if "{" not in word}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A fact in a document: a key word with its value words right after it.

    Parameters
    ----------
    depth : float
        Where the sentence starts, as a fraction of the document's words.
    """

    key: str
    values: tuple[str, ...]
    depth: float

    @property
    def sentence(self) -> str:
        """The fact as it stands in the document."""
        return _SENTENCE.format(key=self.key, values=" ".join(self.values))

    @property
    def answer(self) -> str:
        """What greedy generation of ``len(values)`` tokens decodes to when the needle is found."""
        return " ".join(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedDocument:
    """A document with its needles; every ``prompt`` of it has ``context`` tokens, the first one included."""

    text: str
    needles: tuple[Needle, ...]
    context: int

    def prompt(self, needle: Needle) -> str:
        """The document, then the question about one needle."""
        return f"{self.text}\n{question(needle)}"


def question(needle: Needle) -> str:
    """A sentence that asks for a needle and ends with its key word."""
    return _QUESTION.format(key=needle.key)


def plant_needles(text: str, *, count: int, context: int, seed: int = 0, values: int = 2) -> PlantedDocument:
    """Cut a text to length and plant needles in it, one at a random place in each of ``count`` equal stretches.

    Keys and values are taken from the words that only needles use, each once, and never one that the text has itself.

    Parameters
    ----------
    text : str
        The document; its beginning is used.
    count : int
        Needles.
    context : int
        Tokens of a whole prompt: first token, document with needles, question.
    values : int
        Value words of each needle.

    Raises
    ------
    InputError
        When the text is empty or too short, the context too small, or the needle words do not suffice.
    """
    for name, number in (("count", count), ("values", values)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    spans = split_words(text)
    if not spans:
        raise InputError(
            f"a document must hold at least one word, got {len(text)} characters without one; pass another text"
        )
    rng = random.Random(seed)
    facts = _choose_facts(rng, {text[start:end] for start, end in spans}, count, values)
    overhead = 1 + len(split_words(question(facts[0]))) + count * len(split_words(facts[0].sentence))
    room = context - overhead
    if room < count:
        raise InputError(
            f"{count} needles of {values} values need a context of at least {overhead + count} tokens, got {context}; "
            "raise the context or plant fewer needles"
        )
    if len(spans) < room:
        raise InputError(
            f"a context of {context} tokens needs a document of at least {room} words, got {len(spans)}; "
            "pass a longer document or a smaller context"
        )
    return _plant(text, spans[:room], facts, context, rng)


def _choose_facts(rng: random.Random, taken: set[str], count: int, values: int) -> list[Needle]:
    """``count`` needles without a place, of words that the text does not have."""
    keys = [word for word in NEEDLE_KEYS if word not in taken]
    numbers = [word for word in NEEDLE_VALUES if word not in taken]
    if len(keys) < count or len(numbers) < count * values:
        raise InputError(
            f"{count} needles of {values} values need {count} keys and {count * values} values that the document "
            f"does not have, got {len(keys)} and {len(numbers)}; plant fewer needles"
        )
    keys, numbers = rng.sample(keys, count), rng.sample(numbers, count * values)
    return [
        Needle(key=key, values=tuple(numbers[values * index : values * (index + 1)]), depth=0.0)
        for index, key in enumerate(keys)
    ]


def _plant(
    text: str, spans: list[tuple[int, int]], facts: list[Needle], context: int, rng: random.Random
) -> PlantedDocument:
    """Put each fact before a word, on a line of its own."""
    pieces, needles, done = [], [], 0
    for index, fact in enumerate(facts):
        low, high = index * len(spans) // len(facts), (index + 1) * len(spans) // len(facts)
        word = rng.randrange(low, high)
        needle = Needle(key=fact.key, values=fact.values, depth=word / len(spans))
        pieces += [text[done : spans[word][0]], "\n", needle.sentence, "\n"]
        needles.append(needle)
        done = spans[word][0]
    pieces.append(text[done : spans[-1][1]])
    return PlantedDocument(text="".join(pieces), needles=tuple(needles), context=context)


def read_default_document(tokens: int) -> str:
    """At least ``tokens`` words of real text: the sources of Python's standard library, sorted by name within a folder.

    The same on every call with one Python installation; another Python version has other sources.

    Raises
    ------
    InputError
        When this Python comes without enough of its sources.
    """
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}")
    root = Path(sysconfig.get_path("stdlib"))
    pieces, found = [], 0
    for path in _sources(root):
        if found >= tokens:
            break
        piece = path.read_text(encoding="utf-8", errors="replace")
        pieces.append(piece)
        found += len(split_words(piece))
    if found < tokens:
        raise InputError(
            f"{tokens} words of the standard library's sources are needed, {root} has {found}; "
            "pass a document of your own"
        )
    return "\n".join(pieces)


def _sources(root: Path) -> Iterator[Path]:
    """The standard library's own Python files, sorted; neither its tests nor what is installed beside it."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _FOREIGN_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
