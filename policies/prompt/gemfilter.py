"""GemFilter: an early layer says which prompt tokens to run (Shi et al. 2024, arXiv 2409.17422, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from kvtier.core.policy import Need, PromptFilterPolicy
from kvtier.errors import CompositionError, PolicyError
from kvtier.policies.prompt.ranking import best_tokens, check_edges, edges
from kvtier.types import KVLayout

__all__ = ["GemFilter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemFilter(PromptFilterPolicy):
    """Run the prompt up to one layer, and only the tokens that its last query looks at through the whole model.

    Parameters
    ----------
    keep : int, optional
        Prompt tokens that are run, beginning and end included; None takes the ``keep`` of the patch.
    layer : int, optional
        The layer that votes. By default half of the depth, or the next layer after it that attends to all tokens: the
        paper takes 13 of 32, 19 of 40 and 19 of 32, its scores fall before that layer and hardly change behind it.
    kernel : int
        Width of the pool over neighbouring tokens, odd; neighbours of a needle survive with it.
    pool : "mean" | "max"
        How the neighbours' votes become one. The published code takes their mean, and so does the default; "max" does
        not let one sharp vote drown among them, and finds more facts that stand alone: on the constructed model of
        ``kvtier demo`` at 16K tokens 7 of 8, where the mean finds 6.
    prefix, suffix : int
        Tokens at the beginning and at the end that are always run: the first token, which attention rests on, and the
        question.

    Notes
    -----
    Votes are q.k without scale and softmax, summed over all query heads. As in the paper, the tokens that are left get
    the positions 0, 1, 2, ...; each question needs a first run of its own.

    The published code serves a batch of one, lets beginning and end compete with the document, fills up the pool at
    both ends with votes of 0 (which are high among negative ones), and runs the tokens that are left under the mask of
    the whole prompt. Here each row has its own choice, what is protected neither competes nor lends its votes to its
    neighbours, the pool ends with the prompt, and the mask fits.
    """

    name: ClassVar[str] = "gemfilter"
    paper: ClassVar[str] = "GemFilter, Shi et al. 2024, arXiv 2409.17422, section 3"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAST_QUERY})

    keep: int | None = None
    layer: int | None = None
    kernel: int = 5
    pool: Literal["mean", "max"] = "mean"
    prefix: int = 4
    suffix: int = 32

    def __post_init__(self) -> None:
        check_edges(self.name, self.keep, self.prefix, self.suffix)
        if self.layer is not None and (type(self.layer) is not int or self.layer < 0):
            raise PolicyError(f"gemfilter: layer must be an integer of at least 0, got {self.layer!r}")
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"gemfilter: kernel must be an odd integer of at least 1, got {self.kernel!r}")
        if self.pool not in ("mean", "max"):
            raise PolicyError(f"gemfilter: pool must be 'mean' or 'max', got {self.pool!r}")

    def vote_layer(self, layout: KVLayout) -> int:
        """``layer``, or the first layer from half of the depth on that attends to all tokens."""
        depth = len(layout.layers)
        if self.layer is None:
            whole = [index for index in range(depth // 2, depth) if layout.layers[index].window is None]
            if not whole:
                raise CompositionError(
                    f"gemfilter votes in a layer that attends to all tokens, and none of the layers {depth // 2} to "
                    f"{depth - 1} does; name an earlier one: gemfilter(layer=...)"
                )
            return whole[0]
        if self.layer >= depth:
            raise CompositionError(f"gemfilter: layer must be from 0 to {depth - 1} in this model, got {self.layer}")
        if layout.layers[self.layer].window is not None:
            raise CompositionError(
                f"gemfilter: layer {self.layer} has a sliding window of {layout.layers[self.layer].window} tokens and "
                "sees no more of the prompt; name a layer that attends to all tokens"
            )
        return self.layer

    def protected(self, tokens: int) -> torch.Tensor:
        """The first ``prefix`` and the last ``suffix`` tokens [T] bool."""
        return edges(tokens, self.prefix, self.suffix)

    def keep_tokens(self, token_ids: torch.Tensor, votes: torch.Tensor, keep: int) -> torch.Tensor:
        """The ``keep`` best of ids [T] by their pooled votes [T]: indices, ascending."""
        del token_ids
        safe = self.protected(votes.shape[0]).to(votes.device)
        pooled = self._pooled(votes.float(), ~safe)
        return best_tokens(pooled, keep, prefix=self.prefix, suffix=self.suffix)

    def _pooled(self, votes: torch.Tensor, open_: torch.Tensor) -> torch.Tensor:
        """Votes [T] of each token's neighbourhood, by the tokens in it that are ``open_`` to choice."""
        pad = self.kernel // 2
        if self.pool == "max":
            masked = votes.masked_fill(~open_, -torch.inf)
            return functional.max_pool1d(masked[None], self.kernel, stride=1, padding=pad)[0]
        both = torch.stack([votes.masked_fill(~open_, 0.0), open_.float()])
        total, count = functional.avg_pool1d(both, self.kernel, stride=1, padding=pad)
        mean: torch.Tensor = total / count.clamp(min=0.5 / self.kernel)
        return mean
