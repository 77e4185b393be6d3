"""One row of ``kvtier demo``: the same questions, asked with one cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from kvtier.cli.demo_scene import Scene
from kvtier.cli.stopwatch import Stopwatch
from kvtier.cli.tiers import peak_bytes

if TYPE_CHECKING:
    from kvtier.core.policy import Policy
    from kvtier.types import Budgets

__all__ = ["ONCE", "PER_QUESTION", "STOCK", "Row", "run_policy", "run_stock"]

STOCK: Final = "transformers"
ONCE: Final = "once, forked"
PER_QUESTION: Final = "per question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one cache made of the questions.

    Parameters
    ----------
    tokens : tuple of tuple of int
        Generated token ids, one tuple a question.
    agreement : float
        Fraction of the generated tokens that are those of the stock cache.
    bytes : dict of str to int
        The most KV bytes that each tier held.
    prefill : str
        How often the text ran through the model: ``"once, forked"`` or ``"per question"``.
    prefill_s : float
        Seconds for the text to run through the model once.
    first_token_s : float
        Mean seconds from a question to the first token of its answer.
    """

    name: str
    lossless: bool
    tokens: tuple[tuple[int, ...], ...]
    found: int
    agreement: float
    bytes: dict[str, int]
    prefill: str
    prefill_s: float
    first_token_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class _Answers:
    """Token ids and moments of every question, and the seconds of a shared prefill."""

    tokens: tuple[tuple[int, ...], ...]
    watches: tuple[Stopwatch, ...]
    shared_s: float | None


def run_stock(scene: Scene, tick: Callable[[], object]) -> Row:
    """Transformers' own cache and attention: what the others are compared with."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=scene.model.config)
    answers = _ask_forks(scene, cache, tick)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return _row(scene, STOCK, answers, answers.tokens, {"device": held, "host": 0, "nvme": 0}, lossless=True)


def run_policy(
    scene: Scene,
    stock: Row,
    name: str,
    policy: Policy,
    budgets: Budgets,
    store: dict[str, Any],
    tick: Callable[[], object],
) -> Row:
    """The patched model; the text runs once if what the policy keeps does not depend on the question."""
    from kvtier.integrations.hf.patch import patch

    with patch(scene.model, policy, keep=budgets.keep, read=budgets.read, device=budgets.device, store=store) as handle:
        if any(part.query_aware for part in policy.parts):
            answers = _ask_afresh(scene, handle.new_cache, tick)
        else:
            answers = _ask_forks(scene, handle.new_cache(), tick)
        held = peak_bytes(handle.report().to_dict())
    lossless = all(part.lossless for part in policy.parts)
    return _row(scene, name, answers, stock.tokens, held, lossless=lossless)


def _ask_forks(scene: Scene, cache: Any, tick: Callable[[], object]) -> _Answers:
    """Run the text once, and ask each question on a copy of its cache."""
    # One new token: it is chosen but never fed, so the cache holds the text and nothing else.
    _, shared = _generate(scene, scene.shared, cache, 1)
    tick()
    said, watches = [], []
    for index in range(len(scene.questions)):
        with _closing(copy.deepcopy(cache)) as twin:
            tokens, watch = _ask(scene, index, twin)
        said.append(tokens)
        watches.append(watch)
        tick()
    return _Answers(tuple(said), tuple(watches), shared.prefill_s)


def _ask_afresh(scene: Scene, new_cache: Callable[[], Any], tick: Callable[[], object]) -> _Answers:
    """Run the text again before each question."""
    said, watches = [], []
    tick()
    for index in range(len(scene.questions)):
        with _closing(new_cache()) as cache:
            tokens, watch = _ask(scene, index, cache)
        said.append(tokens)
        watches.append(watch)
        tick()
    return _Answers(tuple(said), tuple(watches), None)


@contextlib.contextmanager
def _closing(cache: Any) -> Iterator[Any]:
    """Free a cache at once; transformers' own has nothing to close."""
    try:
        yield cache
    finally:
        if hasattr(cache, "close"):
            cache.close()


def _ask(scene: Scene, index: int, cache: Any) -> tuple[tuple[int, ...], Stopwatch]:
    """The answer to one question, as long as the right one."""
    prompt = torch.cat((scene.shared, scene.questions[index]), dim=1)
    return _generate(scene, prompt, cache, len(scene.answers[index]))


def _generate(scene: Scene, prompt: torch.Tensor, cache: Any, new_tokens: int) -> tuple[tuple[int, ...], Stopwatch]:
    """Generate greedily after a prompt [1, T], of which the cache may hold the beginning."""
    watch = Stopwatch()
    output = scene.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        streamer=watch,
    )
    return tuple(output[0, prompt.shape[1] :].tolist()), watch


def _row(
    scene: Scene,
    name: str,
    answers: _Answers,
    stock: tuple[tuple[int, ...], ...],
    held: dict[str, int],
    *,
    lossless: bool,
) -> Row:
    first_token_s = sum(watch.prefill_s for watch in answers.watches) / len(answers.watches)
    decode_s = sum(watch.decode_s for watch in answers.watches)
    decode_steps = sum(watch.decode_steps for watch in answers.watches)
    return Row(
        name=name,
        lossless=lossless,
        tokens=answers.tokens,
        found=sum(said == right for said, right in zip(answers.tokens, scene.answers, strict=True)),
        agreement=_agreement(answers.tokens, stock),
        bytes=held,
        prefill=PER_QUESTION if answers.shared_s is None else ONCE,
        prefill_s=first_token_s if answers.shared_s is None else answers.shared_s,
        first_token_s=first_token_s,
        decode_tokens_per_s=decode_steps / decode_s if decode_s > 0 else 0.0,
    )


def _agreement(said: tuple[tuple[int, ...], ...], stock: tuple[tuple[int, ...], ...]) -> float:
    """Fraction of equal tokens; a token that one of both lacks is not equal."""
    same = sum(a == b for ours, theirs in zip(said, stock, strict=True) for a, b in zip(ours, theirs, strict=False))
    return same / sum(max(len(ours), len(theirs)) for ours, theirs in zip(said, stock, strict=True))
