"""Documents with needles: exact length, unique words, the same on every call, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.testing.induction import Needle, build_tokenizer, plant_needles, question, read_default_document
from kvtier.testing.induction.words import NEEDLE_KEYS, NEEDLE_VALUES, split_words

LINE = "the cat sat on the mat, and the dog (a setter) barked at it.\n"


def words(text: str) -> list[str]:
    return [text[start:end] for start, end in split_words(text)]


@given(count=st.integers(1, 8), values=st.integers(1, 4), seed=st.integers(0, 99), context=st.integers(90, 400))
def test_every_prompt_has_exactly_the_context(count: int, values: int, seed: int, context: int) -> None:
    document = plant_needles(LINE * 40, count=count, context=context, seed=seed, values=values)

    for needle in document.needles:
        prompt = words(document.prompt(needle))
        assert len(prompt) + 1 == context
        assert prompt[-1] == needle.key
        place = prompt.index(needle.key)
        assert tuple(prompt[place + 1 : place + 1 + values]) == needle.values
        assert needle.sentence in document.text
    planted = [word for needle in document.needles for word in (needle.key, *needle.values)]
    assert all(words(document.text).count(word) == 1 for word in planted)
    room = context - 1 - len(words(question(needle))) - count * len(words(needle.sentence))
    for index, needle in enumerate(document.needles):
        assert index * room // count <= round(needle.depth * room) < (index + 1) * room // count


def test_the_seed_alone_decides() -> None:
    first, again, other = (plant_needles(LINE * 40, count=4, context=300, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert first.text != other.text


def test_words_of_the_document_are_not_planted() -> None:
    text = " ".join((*NEEDLE_KEYS[:-2], *NEEDLE_VALUES[:-4], LINE * 40))
    document = plant_needles(text, count=2, context=900)

    assert {needle.key for needle in document.needles} == set(NEEDLE_KEYS[-2:])
    assert {value for needle in document.needles for value in needle.values} == set(NEEDLE_VALUES[-4:])
    with pytest.raises(InputError, match="3 keys and 6 values that the document does not have, got 2 and 4"):
        plant_needles(text, count=3, context=900)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "at least one word, got 0 characters"),
        (" \n\t", {}, "at least one word, got 3 characters"),
        (LINE, {}, "a document of at least 285 words, got 18; pass a longer document or a smaller context"),
        (LINE * 40, {"context": 15}, "a context of at least 16 tokens, got 15; raise the context"),
        (LINE * 40, {"count": 0}, "count must be at least 1, got 0"),
        (LINE * 40, {"values": 0}, "values must be at least 1, got 0"),
        (LINE * 40, {"count": 65}, "65 keys and 130 values that the document does not have, got 64 and 512"),
    ],
)
def test_refuses_what_cannot_be_planted(text: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plant_needles(text, **{"count": 1, "context": 300, **settings})


def test_default_document_is_long_enough_and_the_same() -> None:
    text = read_default_document(65536)

    assert len(split_words(text)) >= 65536
    assert read_default_document(65536) == text
    assert text.startswith(read_default_document(100))
    with pytest.raises(InputError, match="tokens must be at least 1, got 0"):
        read_default_document(0)


def test_python_without_sources_is_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match=r"100 words of the standard library's sources are needed, .* has 0; pass a"):
        read_default_document(100)


@given(text=st.text(max_size=60))
def test_tokenizer_splits_as_the_document_does(text: str) -> None:
    tokenizer = build_tokenizer(f"{text} word")
    ids = tokenizer(text)["input_ids"]

    assert tokenizer.convert_ids_to_tokens(ids) == [tokenizer.bos_token, *words(text)]


def test_needle_words_are_single_tokens_in_any_document() -> None:
    tokenizer = build_tokenizer("a")
    needle = Needle(key="amber-falcon", values=("4821", "4858"), depth=0.0)
    ids = tokenizer(f"{needle.sentence}\n{question(needle)}", add_special_tokens=False)["input_ids"]

    assert tokenizer.unk_token_id not in ids
    assert len(ids) == len(needle.sentence.split()) + len(question(needle).split())
    assert tokenizer.decode(ids[2:5]) == f"{needle.key} {needle.answer}"


def test_words_beyond_the_vocabulary_are_unknown() -> None:
    tokenizer = build_tokenizer("known")

    assert tokenizer("known strange", add_special_tokens=False)["input_ids"][1] == tokenizer.unk_token_id
    with pytest.raises(InputError, match="at least one word, got 1 characters"):
        build_tokenizer(" ")
