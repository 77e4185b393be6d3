"""The five roles of a policy, and what each declares; the plans they return are those of `kvtier.core.plans`.

A policy is a frozen dataclass of hyper-parameters with pure methods from statistics to index arrays. It moves
nothing: the session and the tiers apply its plans. So every policy is testable without a model, a GPU or a disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from kvtier.core.plans import Boxes, Encoded, IntArray, KeepPlan, MergePlan, StepRule, ZonePlan
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.kernels.top_pages import top_pages

if TYPE_CHECKING:
    from kvtier.core.compose import Composition
    from kvtier.storage_backends.eviction import EvictionOrder
    from kvtier.types import GroupReduce, KVLayout

__all__ = [
    "Boxes",
    "CodecPolicy",
    "Encoded",
    "IntArray",
    "KeepPlan",
    "MergePlan",
    "Need",
    "Phase",
    "PlacementPolicy",
    "Policy",
    "PositionMode",
    "PromptFilterPolicy",
    "RetrievalPolicy",
    "Role",
    "Scope",
    "SelectionPolicy",
    "Sketch",
    "StepRule",
    "ZonePlan",
]

Sketch: TypeAlias = Mapping[str, torch.Tensor]


class Role(Enum):
    """The question a policy answers."""

    PROMPT_FILTER = "prompt filter"
    SELECTION = "selection"
    CODEC = "codec"
    RETRIEVAL = "retrieval"
    PLACEMENT = "placement"


class Need(Enum):
    """A statistic that the runtime computes only when a policy declares it."""

    WINDOW_ATTENTION = "attention of the last queries, summed per key"
    COLUMN_SUMS = "attention of all queries, summed per key"
    ATTENTION_VARIANCE = "variance of the column sums, per layer"
    HIDDEN_STATES = "hidden states of the last tokens"
    NEXT_LAYER_QUERY_WEIGHTS = "query projection of the next layer"
    QUERY_MOMENTS = "mean and covariance of the prompt's queries before rotation"
    KEYS = "keys of the slots, as attention sees them"
    VALUE_NORMS = "lengths of the values of the slots"
    PRE_ROPE_KEYS = "keys before rotation"
    PROMPT_TOKENS = "token ids of the prompt"
    LAST_QUERY = "the prompt's last query against every key of one layer"
    SURPRISAL = "surprisal of every token of the prompt"


class Phase(Enum):
    """When a policy acts."""

    PROMPT = "before prefill"
    PREFILL = "at the end of prefill"
    DECODE = "at each decode step"


class Scope(Enum):
    """What a policy must have seen before it can plan: one layer, or all of them."""

    LAYER = "layer"
    MODEL = "model"


class PositionMode(Enum):
    """Whether kept tokens keep the position that RoPE saw, or are renumbered without gaps."""

    ORIGINAL = "original"
    COMPACT = "compact"


class Policy(ABC):
    """What every policy declares; checked when policies are composed.

    Class attributes, but for phase and positions, which may depend on a policy's parameters.

    Attributes
    ----------
    name, paper : str
        Registry name; paper and section it comes from.
    roles : frozenset of Role
    needs : frozenset of Need
    phase : Phase
    scope : Scope
    position_mode : PositionMode
    lossless : bool
        Whether attention is exact under it.
    query_aware : bool
        Whether what it keeps depends on the question, so that two questions cannot share one prefill.
    """

    __slots__ = ()

    name: ClassVar[str]
    paper: ClassVar[str]
    roles: ClassVar[frozenset[Role]] = frozenset()
    needs: ClassVar[frozenset[Need]] = frozenset()
    scope: ClassVar[Scope] = Scope.LAYER
    lossless: ClassVar[bool] = False
    query_aware: ClassVar[bool] = False

    @property
    def phase(self) -> Phase:
        """When it acts."""
        return Phase.DECODE

    @property
    def position_mode(self) -> PositionMode:
        """What becomes of the positions of kept tokens."""
        return PositionMode.ORIGINAL

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies this one is made of; itself when it is not a composition."""
        return (self,)

    def __or__(self, other: Policy) -> Composition:
        """Compose: ``SnapKV(window=32) | Quest(read=512)``."""
        from kvtier.core.compose import Composition

        if not isinstance(other, Policy):
            return NotImplemented
        return Composition(parts=(*self.parts, *other.parts))

    def check_layout(self, layout: KVLayout) -> None:
        """Raise ``CompositionError`` when a model of this shape cannot be served; any can by default."""
        del layout


class PromptFilterPolicy(Policy):
    """Which prompt tokens are worth running at all?"""

    __slots__ = ()
    roles: ClassVar = frozenset({Role.PROMPT_FILTER})
    query_aware: ClassVar = True
    keep: int | None

    def vote_layer(self, layout: KVLayout) -> int:
        """The layer whose keys the last query votes on, for ``Need.LAST_QUERY``; no later one is run.

        Raises
        ------
        CompositionError
            When a model of this shape has no such layer.
        """
        del layout
        raise PolicyError(f"{self.name} names no layer; LAST_QUERY needs one")

    @property
    def phase(self) -> Phase:
        """Before anything is run."""
        return Phase.PROMPT

    def reading(self, tokenizer: Any) -> PromptFilterPolicy:
        """The same filter, told what it needs to know of a tokenizer; itself by default."""
        del tokenizer
        return self

    def protected(self, tokens: int) -> torch.Tensor:
        """Tokens that are run whatever their votes [T] bool, of a prompt of ``tokens``; none by default."""
        return torch.zeros(tokens, dtype=torch.bool)

    @abstractmethod
    def keep_tokens(self, token_ids: torch.Tensor, votes: torch.Tensor, keep: int) -> torch.Tensor:
        """Prompt tokens to run: indices [min(keep, T)], ascending, of ids [T] int64 by their votes [T] fp32.

        Votes are what ``needs`` names: with ``LAST_QUERY`` q.k summed over the query heads, with ``SURPRISAL`` nats.
        """


class SelectionPolicy(Policy):
    """Which tokens stay, and what happens to the rest?

    With ``Phase.PREFILL`` it acts at the end of a prompt, with ``Phase.DECODE`` also after every step. Slots are always
    given in the order of their positions.

    Attributes
    ----------
    shares_heads : bool
        Whether the KV heads of a layer share one budget, so that each may keep another number of tokens.
    """

    __slots__ = ()
    roles: ClassVar = frozenset({Role.SELECTION})
    shares_heads: ClassVar[bool] = False
    group_reduce: GroupReduce
    keep: int | None

    @property
    def phase(self) -> Phase:
        """At the end of a prompt."""
        return Phase.PREFILL

    @property
    def merges_steps(self) -> bool:
        """Whether it folds tokens into others after every step."""
        return self.phase is Phase.DECODE and type(self).merge is not SelectionPolicy.merge

    @property
    def step_rule(self) -> StepRule | None:
        """What leaves at a step, in a word: a short way, which must come to what ``score`` and ``select`` would drop.

        None, the default, has those asked.
        """
        return None

    @property
    def skipped_queries(self) -> int:
        """Positions at the start of a text whose queries ``Stats.query_moments`` leaves out."""
        return 0

    @property
    def window_queries(self) -> int:
        """Queries whose attention ``Stats.window_attention`` sums; 0 for policies that do not need it."""
        if Need.WINDOW_ATTENTION not in self.needs:
            return 0
        raise PolicyError(f"{self.name} declares no query window; WINDOW_ATTENTION needs one")

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        """Slots that are never ranked [B, Hk, T] bool, by their positions [B, Hk, T]; none by default."""
        return torch.zeros_like(positions, dtype=torch.bool)

    @abstractmethod
    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        """Votes [B, Hk, T] fp32, higher is kept."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        """Keep the protected slots, the newest first, then the best scores; of equal scores the earlier slot wins."""
        total = scores.shape[-1]
        order = torch.arange(total, device=scores.device, dtype=torch.float64) / total
        rank = torch.where(view.protected, 1.0 + order, torch.zeros_like(order))
        best = torch.argsort(scores.to(torch.float64), dim=-1, descending=True, stable=True)
        place = torch.empty_like(best)
        place.scatter_(-1, best, torch.arange(total, device=scores.device).expand_as(best).contiguous())
        rank = torch.where(view.protected, rank, -place.to(torch.float64))
        kept = torch.topk(rank, min(keep, total), dim=-1).indices
        return KeepPlan(torch.sort(kept, dim=-1).values)

    def least(self, keep: int) -> int:
        """Tokens that every KV head of a layer keeps at least, of ``keep`` on average: all of it by default."""
        return keep

    def allocate(self, layout: KVLayout, keep: int) -> tuple[int, ...]:
        """Tokens kept per KV head in each layer; their mean is ``keep``. Uniform by default."""
        return (keep,) * len(layout.layers)

    def share(self, keep: tuple[int, ...], column_sums: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """What each layer keeps once all were seen, for ``Scope.MODEL``: ``keep`` by default, and the same sum.

        ``column_sums`` [Hq, T] of one sequence, layer by layer, as many as there are budgets.
        """
        del column_sums
        return keep

    def merge(self, view: SlotView, plan: KeepPlan) -> MergePlan | None:
        """How dropped slots are folded into kept ones; None drops them, and forgets what was remembered."""
        del view, plan
        return None


class CodecPolicy(Policy):
    """How is a sealed block written?"""

    __slots__ = ()
    roles: ClassVar = frozenset({Role.CODEC})

    @property
    def uniform_bits(self) -> int | None:
        """Bits b of a uniform code, whose 2**b levels span a group from its least to its largest; None for others."""
        return None

    @abstractmethod
    def encode(self, block: torch.Tensor) -> Encoded:
        """Encode K or V of one sealed block [Hk, block_tokens, D]; bytes do not depend on what follows."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> torch.Tensor:
        """The block [Hk, block_tokens, D] again, within ``error_bound``."""

    @abstractmethod
    def error_bound(self, encoded: Encoded) -> float:
        """Largest absolute error of one element of ``decode``."""


class RetrievalPolicy(Policy):
    """Which pages does this query need?"""

    __slots__ = ()
    roles: ClassVar = frozenset({Role.RETRIEVAL})
    read: int | None
    dense_layers: int

    @property
    def upper_bound(self) -> bool:
        """Whether a page's score is at least the logit of every key in it, for every query head and query."""
        return False

    def pinned(self, sketch: Sketch) -> torch.Tensor:
        """Pages [B, Hk, N] bool that are read whatever the query and counted in the budget; none by default.

        Sketches are [B, Hk, N, ...]. ``rank`` scores them above all others.
        """
        some = next(iter(sketch.values()))
        return torch.zeros(some.shape[:3], dtype=torch.bool, device=some.device)

    @abstractmethod
    def sketch(self, keys: torch.Tensor) -> Sketch:
        """Summaries of sealed pages from their keys [Hk, N, P, Dk]: tensors [Hk, N, ...] by name."""

    @abstractmethod
    def sketch_bytes(self, key_dim: int, element_bytes: int) -> int:
        """Bytes of the summary of one page."""

    @abstractmethod
    def rank(self, query: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        """Scores of pages [B, Hk, N] for queries [B, Hq, Tq, Dk], higher is read first.

        Sketches are [B, Hk, N, ...].
        """

    def boxes(self, sketch: Sketch) -> Boxes | None:
        """The bounds by which ``rank`` and ``choose`` go where they do nothing else; None for any other policy.

        Ranking, choice and attention are then one call: neither of the two is asked in a step of one token.
        """
        return None

    def choose(self, scores: torch.Tensor, pages: int) -> ZonePlan:
        """The ``pages`` best pages of each KV head; all of them when there are fewer."""
        return ZonePlan(top_pages(scores, pages))


class PlacementPolicy(Policy):
    """Where does it live?

    Attributes
    ----------
    scan_resistant : bool
        Whether what was used again and again outlives a long run of what is used once.
    """

    __slots__ = ()
    roles: ClassVar = frozenset({Role.PLACEMENT})
    lossless: ClassVar = True
    scan_resistant: ClassVar[bool] = False

    @abstractmethod
    def order(self) -> EvictionOrder:
        """A fresh order of who leaves first, for one tier; it holds all state, the policy none."""
