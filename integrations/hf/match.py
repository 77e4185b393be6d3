"""The rows of a prompt in the store: how far each is stored, and the one column that all can go on from."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvtier.core.resume import StoredRow

if TYPE_CHECKING:
    from kvtier.core.hit import Hit
    from kvtier.core.load_worth import LoadDecision, RecomputeRate
    from kvtier.core.namespace import Namespace
    from kvtier.integrations.hf.stored_prompt import StoredPrompt

__all__ = ["Match"]


class Match:
    """What a namespace has of the rows of a prompt; leased as long as ``leases`` is open.

    Parameters
    ----------
    recompute : RecomputeRate, optional
        How fast the model prefills, to tell what is worth loading.
    leases : ExitStack
        Lets the hits go.

    Attributes
    ----------
    columns : int
        Columns of the prompt that every row can be restored to.
    stored_chunks : tuple of int
        Leading chunks of each row that are stored, worth loading or not.
    tokens : int
        Tokens that are stored, over all rows.
    decision : LoadDecision, optional
        About the row with the longest stored prefix.
    """

    def __init__(
        self, space: Namespace, prompt: StoredPrompt, recompute: RecomputeRate | None, leases: ExitStack
    ) -> None:
        self._space = space
        self._prompt = prompt
        self._leases = leases
        self._sources: list[int | None] = []
        self._hits: list[Hit] = []
        first: dict[bytes, int] = {}
        for row in range(prompt.ids.shape[0]):
            tokens = prompt.row(row)
            source = first.setdefault(tokens.numpy().tobytes(), row)
            self._sources.append(None if source == row else source)
            hit = self._hits[source] if source < row else space.match(tokens, recompute=recompute, owner="generate")
            self._hits.append(leases.enter_context(hit) if source == row else hit)
        reach = [pad + hit.tokens for pad, hit in zip(prompt.padding, self._hits, strict=True)]
        self.columns = min(reach)
        self.stored_chunks = tuple(hit.stored_tokens // space.layout.chunk_tokens for hit in self._hits)
        self.tokens = sum(hit.stored_tokens for hit in self._hits)
        longest = max(self._hits, key=lambda hit: hit.stored_tokens)
        self.decision: LoadDecision | None = longest.decision

    def rows(self, columns: int) -> list[StoredRow] | None:
        """What each row takes to go on from column ``columns``; None when some of it has gone meanwhile."""
        rows = []
        for row, pad in enumerate(self._prompt.padding):
            tokens = max(0, columns - pad)
            source = self._sources[row]
            hit = self._hits[row] if source is None and tokens else None
            if hit is not None:
                hit = self._cut(row, hit, tokens)
                if hit is None:
                    return None
            rows.append(StoredRow(tokens, hit, source))
        return rows

    def _cut(self, row: int, hit: Hit, tokens: int) -> Hit | None:
        """A hit on just the chunks that the first ``tokens`` of a row reach into."""
        chunk = self._space.layout.chunk_tokens
        needed = -(-tokens // chunk) * chunk
        if hit.tokens == needed:
            return hit
        shorter = self._leases.enter_context(self._space.match(self._prompt.row(row)[:needed], owner="generate"))
        return shorter if shorter.tokens == needed else None
