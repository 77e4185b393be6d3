"""How large and how often: the measurement proper, and the quick one that only shows that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["METHODS", "PROPER", "QUICK", "Settings"]

METHODS: Final = ("streamingllm", "snapkv", "pyramidkv", "tova", "h2o", "adakv", "expected attention")
"""What both libraries have; of those of kvtier, the ones that it knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run.

    Parameters
    ----------
    context, steps, layers, hidden : int
        Prompt and following tokens of the random model, and its size; heads of 64, half as many KV heads.
    induction_context, needles : int
        Text of the induction model and facts in it, each asked for by a prompt of its own.
    share : int
        One token of so many is kept.
    rounds : int
        Turns that every method takes.
    plan_context, plan_steps : int
        Slots that a policy chooses from, and steps, of one layer of the size of Llama 3 8B.
    prompt, chunk : int
        A long prompt, and its part that is timed, in the middle.
    prompt_hidden : int
        Hidden size of the one layer that runs it; 4096 is Llama 3 8B's.
    """

    context: int = 4096
    steps: int = 32
    layers: int = 3
    hidden: int = 512
    induction_context: int = 2048
    needles: int = 4
    share: int = 4
    rounds: int = 2
    plan_context: int = 8192
    plan_steps: int = 24
    prompt: int = 32768
    chunk: int = 512
    prompt_hidden: int = 4096


PROPER: Final = Settings()
QUICK: Final = Settings(
    context=512,
    steps=3,
    layers=2,
    hidden=128,
    induction_context=640,
    needles=1,
    rounds=1,
    plan_context=512,
    plan_steps=3,
    prompt=1024,
    chunk=64,
    prompt_hidden=256,
)
