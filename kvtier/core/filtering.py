"""Prompt filters apart from the rest of a policy: checked against a model, and their plans checked before they run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvtier.core.compose import Composition
from kvtier.core.policy import Need, Policy, PromptFilterPolicy, Role
from kvtier.errors import CompositionError, PolicyError
from kvtier.registry import policies
from kvtier.types import Budgets, KVLayout

__all__ = ["BoundFilter", "take_filter"]

_VOTES = frozenset({Need.LAST_QUERY, Need.SURPRISAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundFilter:
    """A prompt filter with its budget, checked against a model.

    Parameters
    ----------
    policy : PromptFilterPolicy
        What chooses.
    keep : int
        Prompt tokens that are run.
    layer : int, optional
        The last layer that the first run needs, whose last query votes; None when the whole model's surprisal does.
    """

    policy: PromptFilterPolicy
    keep: int
    layer: int | None

    def plan(self, token_ids: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
        """Tokens of one prompt that are run: indices into ids [T] int64, ascending.

        Raises
        ------
        PolicyError
            When the policy chooses none, or no tokens of the prompt.
        """
        total = token_ids.shape[0]
        kept = self.policy.keep_tokens(token_ids, votes, self.keep).to("cpu")
        name = self.policy.name
        if kept.dim() != 1 or kept.dtype != torch.int64 or not kept.numel():
            raise PolicyError(
                f"{name} must choose at least one of {total} prompt tokens, as a vector of int64 indices; got "
                f"{kept.numel()} in a tensor {list(kept.shape)} of {kept.dtype}"
            )
        if int(kept[0]) < 0 or int(kept[-1]) >= total or bool((kept.diff() <= 0).any()):
            raise PolicyError(f"{name} must choose distinct tokens from 0 to {total - 1} in ascending order")
        return kept


def take_filter(chosen: Policy, layout: KVLayout, budgets: Budgets) -> tuple[BoundFilter | None, Policy, Budgets]:
    """Split a policy into its prompt filter, if it has one, and what a session runs on the tokens that are left.

    ``keep`` goes to the policy that evicts, if there is one; the filter then needs a ``keep`` of its own.

    Raises
    ------
    CompositionError
        When the filter has no budget, or cannot work with a model of this shape.
    """
    held = [part for part in chosen.parts if isinstance(part, PromptFilterPolicy)]
    if not held:
        return None, chosen, budgets
    (own,) = held
    rest = tuple(part for part in chosen.parts if part is not own)
    if chosen.parts[0] is not own:
        raise CompositionError(
            f"{own.name} acts before all others; write it first: {' | '.join(part.name for part in (own, *rest))}"
        )
    evicting = any(Role.SELECTION in part.roles for part in rest)
    keep = _keep(own, None if evicting else budgets.keep)
    if not evicting:
        budgets = replace(budgets, keep=None)
    own.check_layout(layout)
    votes = own.needs & _VOTES
    if len(votes) != 1 or own.needs - _VOTES - {Need.PROMPT_TOKENS}:
        raise CompositionError(
            f"{own.name} needs {', '.join(sorted(need.name for need in own.needs)) or 'nothing'}; a prompt filter "
            "needs one of LAST_QUERY and SURPRISAL to vote by"
        )
    layer = own.vote_layer(layout) if Need.LAST_QUERY in votes else None
    left: Policy = policies.resolve("full")()
    if rest:
        left = rest[0] if len(rest) == 1 else Composition(parts=rest)
    return BoundFilter(policy=own, keep=keep, layer=layer), left, budgets


def _keep(own: PromptFilterPolicy, given: int | None) -> int:
    if own.keep is not None and given is not None and own.keep != given:
        raise CompositionError(f"{own.name}(keep={own.keep}) and keep={given} disagree; give one of them")
    keep = own.keep if own.keep is not None else given
    if keep is None:
        raise CompositionError(f"{own.name} needs keep, the prompt tokens to run: {own.name}(keep=1024)")
    return keep
