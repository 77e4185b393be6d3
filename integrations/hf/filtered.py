"""A prompt as it was given and as it was run: what a filter left of it, and how to tell the one from the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtier.core.report import PromptReport
from kvtier.integrations.hf.stored_prompt import StoredPrompt

__all__ = ["Filtered"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Filtered:
    """The prompt that began a cache, rows as the cache has them.

    Parameters
    ----------
    given, run : StoredPrompt
        All of it, and what is run, both padded on the left.
    kept : tuple of Tensor
        Tokens of each row that are run: indices into its tokens, ascending.
    votes : tuple of Tensor
        [tokens] fp32 of each row.
    votes_seconds : float
        Time that the votes took.
    """

    given: StoredPrompt
    run: StoredPrompt
    kept: tuple[torch.Tensor, ...]
    votes: tuple[torch.Tensor, ...]
    votes_seconds: float

    @classmethod
    def of(
        cls, given: StoredPrompt, kept: Sequence[torch.Tensor], votes: Sequence[torch.Tensor], seconds: float
    ) -> Filtered:
        """Leave only the ``kept`` tokens of each row."""
        width = max(own.numel() for own in kept)
        ids = given.ids[:, :1].repeat(1, width)
        real = torch.zeros(len(kept), width, dtype=torch.bool)
        for row, own in enumerate(kept):
            # A row with fewer tokens than another had padding before, so its first id is that of padding.
            ids[row, width - own.numel() :] = given.row(row)[own]
            real[row, width - own.numel() :] = True
        return cls(
            given=given, run=StoredPrompt(ids, real), kept=tuple(kept), votes=tuple(votes), votes_seconds=seconds
        )

    @property
    def whole(self) -> bool:
        """Whether every token is run."""
        return torch.equal(self.run.ids, self.given.ids)

    def shown(self, fed: torch.Tensor) -> torch.Tensor:
        """What was given [B, T] where ``fed`` [B, T'] was run: the prompt, and all that came after it."""
        return torch.cat([self.given.ids, fed[:, self.run.columns :]], dim=1)

    def repeated(self, times: int) -> Filtered:
        """Each row ``times`` times, copies side by side, as beams are."""
        if times == 1:
            return self
        return replace(
            self,
            given=self.given.repeated(times),
            run=self.run.repeated(times),
            kept=tuple(own for own in self.kept for _ in range(times)),
            votes=tuple(own for own in self.votes for _ in range(times)),
        )

    def reordered(self, rows: Sequence[int]) -> Filtered:
        """Row i becomes what row ``rows[i]`` was."""
        index = torch.tensor(list(rows))
        return replace(
            self,
            given=StoredPrompt(self.given.ids[index], self.given.real[index]),
            run=StoredPrompt(self.run.ids[index], self.run.real[index]),
            kept=tuple(self.kept[row] for row in rows),
            votes=tuple(self.votes[row] for row in rows),
        )

    def report(self) -> PromptReport:
        """The counts."""
        return PromptReport(
            tokens_prompt=int(self.given.real.sum()),
            tokens_run=int(self.run.real.sum()),
            votes_seconds=self.votes_seconds,
        )
