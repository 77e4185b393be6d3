"""Surprisal keeps the laws of prompt filters, and what must not be lost."""

import pytest
import torch

from kvtier.core.policy import PromptFilterPolicy
from kvtier.errors import PolicyError
from kvtier.policies.prompt.surprisal import Surprisal
from kvtier.testing.prompt_laws import PromptFilterLaws


class TestLaws(PromptFilterLaws):
    @pytest.fixture(params=[{}, {"separator": 2, "kernel": 3}], ids=["plain", "separator"])
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"kernel": 2}, "kernel must be an odd integer"), ({"separator": "\n"}, "separator must be a token id")],
)
def test_fields_are_checked(fields: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Surprisal(**fields)
