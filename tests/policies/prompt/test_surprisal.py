"""Surprisal keeps the laws of prompt filters, and what must not be lost."""

import pytest
import torch

from kvtier.core.filtering import take_filter
from kvtier.core.policy import PromptFilterPolicy
from kvtier.errors import CompositionError, PolicyError
from kvtier.policies.prompt.surprisal import Surprisal
from kvtier.testing.prompt_laws import PromptFilterLaws
from kvtier.types import Budgets, KVLayout


class TestLaws(PromptFilterLaws):
    @pytest.fixture(
        params=[{}, {"separator": 2, "kernel": 3}, {"unit": "word", "starts": frozenset(range(0, 100, 3))}],
        ids=["plain", "separator", "words"],
    )
    def policy(self, request: pytest.FixtureRequest) -> PromptFilterPolicy:
        return Surprisal(prefix=2, suffix=3, **request.param)


def kept(policy: Surprisal, nats: list[float], keep: int, ids: list[int] | None = None) -> list[int]:
    return policy.keep_tokens(torch.tensor(ids or [0] * len(nats)), torch.tensor(nats), keep).tolist()


def test_the_most_surprising_tokens_are_run() -> None:
    assert kept(Surprisal(prefix=1, suffix=1), [0.1, 3.0, 0.2, 5.0, 0.0, 4.0, 0.3], 5) == [0, 1, 3, 5, 6]


def test_separators_are_run_before_what_votes() -> None:
    ids = [5, 5, 9, 5, 9, 5, 5]

    assert kept(Surprisal(prefix=1, suffix=1, separator=9), [0.0, 7.0, 0.0, 8.0, 0.0, 9.0, 0.0], 5, ids) == [
        0,
        2,
        4,
        5,
        6,
    ]


def test_a_kernel_keeps_phrases_together() -> None:
    nats = [0.0, 0.0, 3.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0]

    assert kept(Surprisal(prefix=0, suffix=0), nats, 3) == [2, 5, 6]
    assert kept(Surprisal(prefix=0, suffix=0, kernel=3), nats, 3) == [5, 6, 7]


def test_words_are_judged_by_the_mean_of_their_tokens_and_run_whole() -> None:
    #       un- expect -ed | the | cat | s
    ids = [10, 1, 2, 20, 30, 3]
    nats = [3.0, 5.0, 1.0, 2.0, 2.9, 2.9]
    words = Surprisal(prefix=0, suffix=0, unit="word", starts=frozenset({10, 20, 30}))

    assert kept(Surprisal(prefix=0, suffix=0), nats, 3, ids) == [0, 1, 4]
    assert kept(words, nats, 3, ids) == [0, 1, 2]
    assert kept(words, nats, 5, ids) == [0, 1, 2, 4, 5]
    # Where the budget ends inside a word, its beginning is run.
    assert kept(words, nats, 4, ids) == [0, 1, 2, 4]


def test_tokens_before_the_first_word_are_one() -> None:
    words = Surprisal(prefix=0, suffix=0, unit="word", starts=frozenset({10}))

    assert kept(words, [4.0, 0.0, 3.0, 3.0], 2, [1, 2, 10, 3]) == [2, 3]


class Vocabulary:
    """A tokenizer, as far as words need one."""

    def __init__(self, *pieces: str | None, special: tuple[int, ...] = ()) -> None:
        self.pieces, self.all_special_ids = pieces, list(special)

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.pieces[token] for token in ids]


@pytest.mark.parametrize(
    ("vocabulary", "starts"),
    [
        (Vocabulary("<s>", "▁the", "re", "▁", "<0x0A>", "<0x41>", special=(0,)), {0, 1, 3, 4}),
        (Vocabulary("<|end|>", "Ġthe", "re", "Ċ", "ĊĊ", None, special=(0,)), {0, 1, 3, 4}),
        (Vocabulary("[CLS]", "the", "##re", "there", special=(0,)), {0, 1, 3}),
        (Vocabulary("the", "re"), {0, 1}),
    ],
    ids=["sentencepiece", "byte-level", "wordpiece", "words"],
)
def test_pieces_that_begin_a_word(vocabulary: Vocabulary, starts: set[int]) -> None:
    assert Surprisal(unit="word").reading(vocabulary).starts == starts
    assert Surprisal().reading(vocabulary).starts is None


def test_words_that_nobody_told_are_refused() -> None:
    layout = KVLayout.uniform(num_layers=2, num_kv_heads=1, key_dim=8, value_dim=8, dtype="float32")
    with pytest.raises(CompositionError, match=r"give the policy as Surprisal\(unit='word'\).reading\(tokenizer\)"):
        take_filter(Surprisal(unit="word", keep=8), layout, Budgets())
    with pytest.raises(PolicyError, match="knows of none"):
        kept(Surprisal(unit="word"), [0.0] * 9, 3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"unit": "sentence"}, "unit must be 'token' or 'word'"),
        ({"kernel": 2}, "kernel must be an odd integer"),
        ({"separator": "\n"}, "separator must be a token id"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Surprisal(**fields)
