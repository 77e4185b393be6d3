"""Greedy decoding that checks a tree of drafts in every forward: ``python examples/speculation/speculate.py``.

Drafts cost no model: they are what followed the last tokens when they occurred before (prompt lookup). Where they were
followed by different tokens, a tree tries all of them at once and a line only one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import kvtier
from kvtier.testing.induction import build_model, build_tokenizer, plant_needles, question, read_default_document


class Draft(NamedTuple):
    """Tokens of a tree, the first of them certain, and which each follows."""

    tokens: list[int]
    parents: list[int | None]


class Decoded(NamedTuple):
    """New tokens, and the forwards that they took."""

    tokens: list[int]
    forwards: int


def look_up(text: Sequence[int], *, branches: int, depth: int) -> Draft:
    """A tree that starts with the last token of ``text``: what followed it before, the longest likeness first."""
    draft, children = Draft([text[-1]], [None]), dict[tuple[int, int], int]()
    for start in _likest(text)[:branches]:
        above = 0
        for token in text[start : start + depth]:
            below = children.get((above, token))
            if below is None:
                below = children[above, token] = len(draft.tokens)
                draft.tokens.append(token)
                draft.parents.append(above)
            above = below
    return draft


def _likest(text: Sequence[int]) -> list[int]:
    """Where the last token occurred before, and after it: those with most equal tokens before them, then the newest."""
    found = [place for place in range(1, len(text)) if text[place - 1] == text[-1]]
    return sorted(found, key=lambda place: (_likeness(text, place), place), reverse=True)


def _likeness(text: Sequence[int], place: int, most: int = 4) -> int:
    count = 0
    while count < min(most, place) and text[place - 1 - count] == text[len(text) - 1 - count]:
        count += 1
    return count


def verify(draft: Draft, choices: Sequence[int]) -> tuple[list[int], list[int]]:
    """The path on which every token is the model's own choice after the one above, and those choices, one more."""
    path, chosen = [0], [choices[0]]
    while True:
        below = [token for token, parent in enumerate(draft.parents) if parent == path[-1]]
        taken = [token for token in below if draft.tokens[token] == chosen[-1]]
        if not taken:
            return path, chosen
        path.append(taken[0])
        chosen.append(choices[taken[0]])


@torch.no_grad()
def decode(
    model: Any, handle: kvtier.PatchHandle, prompt: torch.Tensor, *, count: int, branches: int, depth: int
) -> Decoded:
    """``count`` tokens after a prompt [1, T], those of plain greedy decoding; the prompt's forward is not counted."""
    cache = handle.new_cache()
    first = int(model(prompt, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())
    text, forwards = [*prompt[0].tolist(), first], 0
    while len(text) < prompt.shape[1] + count:
        draft = look_up(text, branches=branches, depth=depth)
        with cache.drafts(draft.parents):
            logits = model(torch.tensor([draft.tokens]), past_key_values=cache).logits
        path, chosen = verify(draft, logits[0].argmax(-1).tolist())
        cache.accept(path)
        text, forwards = [*text, *chosen], forwards + 1
    cache.close()
    return Decoded(text[prompt.shape[1] : prompt.shape[1] + count], forwards)


def main(words: list[str] | None = None) -> None:
    """Decode with a tree, with a line and without drafts, and say what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="full", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="tokens to decode (default: %(default)s)")
    parser.add_argument("--branches", type=int, default=4, metavar="N", help="of the tree (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=8, metavar="N", help="of the tree (default: %(default)s)")
    options = parser.parse_args(words)

    document = plant_needles(read_default_document(options.context), count=4, context=options.context, values=3)
    tokenizer = build_tokenizer(document.text)
    model: Any = build_model(tokenizer)
    asked = f"{document.text}\n{question(document.needles[0])}"
    prompt = tokenizer(asked, return_tensors="pt").input_ids
    plain = model.generate(prompt, max_new_tokens=options.count, do_sample=False)[0, prompt.shape[1] :].tolist()
    with kvtier.patch(model, options.policy) as handle:
        for name, branches in (("a tree", options.branches), ("a line", 1), ("no drafts", 0)):
            found = decode(model, handle, prompt, count=options.count, branches=branches, depth=options.depth)
            per_forward = (options.count - 1) / found.forwards
            same = "the same tokens" if found.tokens == plain else "OTHER TOKENS"
            print(f"{name:>9}: {found.forwards:3} forwards, {per_forward:.2f} tokens each, {same} as generate()")


if __name__ == "__main__":
    main()
