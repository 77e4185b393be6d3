"""Prompt filters on the induction model: which facts are still there to be found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import kvtier
from kvtier.testing.induction import build_model, build_tokenizer, plant_needles, read_default_document

if TYPE_CHECKING:
    from kvtier.testing.induction import PlantedDocument

ASKED = 4


def found(model: Any, tokenizer: Any, document: PlantedDocument, policy: str, keep: int) -> int:
    """Needles of the first ``ASKED`` that are answered under a policy."""
    right = 0
    with kvtier.patch(model, policy, keep=keep):
        for needle in document.needles[:ASKED]:
            prompt = tokenizer(document.prompt(needle), return_tensors="pt")
            said = model.generate(**prompt, max_new_tokens=len(needle.values))
            right += tokenizer.decode(said[0, prompt["input_ids"].shape[1] :]) == needle.answer
    return right


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    [
        ("gemfilter(pool='max')", ASKED, ASKED),
        ("gemfilter(layer=1)", 0, 1),
    ],
)
def test_the_layer_that_retrieves_finds_the_needles_and_earlier_ones_do_not(
    policy: str, least: int, most: int, scene: Any
) -> None:
    assert least <= found(scene.model, scene.tokenizer, scene.document, policy, keep=512) <= most


def test_surprisal_drops_what_is_said_twice_and_keeps_the_needles() -> None:
    once = " ".join(read_default_document(400).split()[:300])
    document = plant_needles(" ".join([once] * 8), count=ASKED, context=1500, values=3)
    tokenizer = build_tokenizer(document.text)
    model = build_model(tokenizer)

    assert found(model, tokenizer, document, "surprisal(kernel=5)", keep=750) == ASKED
    # The same number of tokens, but those at the end.
    assert found(model, tokenizer, document, "surprisal(suffix=718)", keep=750) < ASKED
