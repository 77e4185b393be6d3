"""Policies by name and composed: what cannot work fails when it is built, with what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvtier import registry
from kvtier.core.compose import Composition, bind, policy
from kvtier.core.policy import CodecPolicy, Encoded, Need, Policy, PositionMode, Role, Scope, SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import CompositionError, ConfigError, KVTierError, PolicyError
from kvtier.policies.eviction.d2o import D2O
from kvtier.policies.eviction.expected_attention import ExpectedAttention
from kvtier.policies.eviction.h2o import H2O
from kvtier.policies.eviction.snapkv import SnapKV
from kvtier.policies.eviction.streamingllm import StreamingLLM
from kvtier.policies.full import Full
from kvtier.policies.placement.lru import LRU
from kvtier.policies.retrieval.quest import Quest
from kvtier.registry import policies
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import open_memory
from kvtier.types import Budgets, KVLayout, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest(SelectionPolicy):
    """A third party's selection."""

    name: ClassVar[str] = "newest"
    paper: ClassVar[str] = "none"
    keep: int | None = None

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        return view.positions.float()


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, registry.Entry]]:
    entries = dict(registry.policies.entries)
    monkeypatch.setattr(registry.policies, "entries", entries)
    return entries


@pytest.mark.parametrize(
    ("text", "built"),
    [
        ("full", Full()),
        (" quest ", Quest()),
        ("quest()", Quest()),
        ("quest(read=512, dense_layers=0)", Quest(read=512, dense_layers=0)),
        ("snapkv(window=16, kernel=5, group_reduce='max')", SnapKV(window=16, kernel=5, group_reduce="max")),
        ("snapkv(keep=None)", SnapKV()),
        ("snapkv(window=16) | quest(read=512)", SnapKV(window=16) | Quest(read=512)),
        ("snapkv|quest|lru", SnapKV() | Quest() | LRU()),
        ("(snapkv | quest) | lru", SnapKV() | (Quest() | LRU())),
    ],
)
def test_a_name_builds_what_the_classes_build(text: str, built: Policy) -> None:
    assert policy(text) == built


def test_a_policy_stays_what_it_is() -> None:
    chosen = SnapKV() | Quest()
    assert policy(chosen) is chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "snapk",
            f"unknown policy 'snapk'; known: {', '.join(policies.names())}; did you mean 'snapkv'?",
        ),
        (
            "quest | zebra",
            f"unknown policy 'zebra'; known: {', '.join(policies.names())}",
        ),
        ("quest(reed=3)", "quest has no parameter 'reed'; allowed: read, dense_layers, group_reduce"),
        ("full(x=1)", "full has no parameter 'x'; allowed: none"),
        ("quest(read=0)", "quest: read must be an integer of at least 1 token, got 0"),
        ("quest(read=-3)", "quest: read must be an integer of at least 1 token, got -3"),
        ("snapkv(kernel=4)", "snapkv: kernel must be an odd integer of at least 1, got 4"),
        ("snapkv(window=8, window=9)", "window is given more than once"),
        ("snapkv(32)", "write names joined by '|', as 'snapkv(window=32) | quest'"),
        ("snapkv(window=[1])", "a parameter is a number, a string, True, False or None"),
        ("snapkv(window=2**9)", "a parameter is a number, a string, True, False or None"),
        ("snapkv(window=-'a')", "a parameter is a number, a string, True, False or None"),
        ("snapkv(window=-None)", "a parameter is a number, a string, True, False or None"),
        ("snapkv(**{'window': 1})", "parameters are written name=value"),
        ("", "cannot read the policy ''"),
        ("snapkv(", "cannot read the policy 'snapkv('"),
        ("snapkv + quest", "cannot read the policy 'snapkv + quest'"),
        ("snapkv || quest", "cannot read the policy"),
        ("kvtier.quest", "cannot read the policy"),
        ("quest()()", "cannot read the policy"),
        ("3", "cannot read the policy '3'"),
        ("[quest]", "cannot read the policy"),
        ("__import__('os')", "cannot read the policy"),
        ("quest; full", "cannot read the policy"),
    ],
)
def test_what_cannot_be_read_says_why_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as error:
        policy(text)

    assert message in str(error.value)


@pytest.mark.parametrize("wrong", [None, 3, ["quest"]])
def test_only_names_and_policies_are_policies(wrong: object) -> None:
    with pytest.raises(PolicyError, match=r"a name such as 'quest\(read=1024\)' or a Policy, got"):
        policy(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Full() | wrong  # type: ignore[operator]


@pytest.mark.parametrize("text", ["snapkv | snapkv(window=4)", "quest | quest", "lru | full | lru"])
def test_one_policy_answers_each_question(text: str) -> None:
    with pytest.raises(CompositionError, match=r"one policy per role: (\w+) and \1 both answer \w+; keep one"):
        policy(text)


def test_a_composition_lists_its_parts_in_order() -> None:
    chosen = SnapKV() | Quest() | LRU()

    assert isinstance(chosen, Composition)
    assert [part.name for part in chosen.parts] == ["snapkv", "quest", "lru"]


def test_binding_fills_in_the_budgets_and_the_placement() -> None:
    bound = bind(policy("snapkv(window=4) | quest(dense_layers=1)"), small_layout(), Budgets(keep=20, read=40))

    assert bound.label == "snapkv | quest"
    assert (bound.keep, bound.read) == ((20, 20, 20), 40)
    assert isinstance(bound.selection, SnapKV)
    assert isinstance(bound.retrieval, Quest)
    assert isinstance(bound.placement, LRU)
    assert not bound.lossless
    assert bind(policy("full | lru"), small_layout(), Budgets()).lossless


@pytest.mark.parametrize("budgets", [Budgets(keep=64), Budgets()])
def test_a_policy_may_bring_its_own_budget(budgets: Budgets) -> None:
    assert bind(SnapKV(keep=64), small_layout(), budgets).keep == (64,) * 3


@pytest.mark.parametrize(
    ("text", "budgets", "message"),
    [
        ("snapkv", {}, "snapkv needs keep, in tokens: snapkv(keep=1024) or keep=1024"),
        ("quest", {}, "quest needs read, in tokens: quest(read=1024) or read=1024"),
        ("snapkv | quest", {"keep": 99}, "quest needs read"),
        ("full", {"keep": 10}, "keep=10 was given but no policy evicts; leave it out or add one that does"),
        ("quest(read=99)", {"keep": 10}, "keep=10 was given but no policy evicts"),
        ("snapkv(keep=99)", {"read": 99}, "read=99 was given but no policy retrieves"),
        ("snapkv(keep=50)", {"keep": 60}, "snapkv(keep=50) and keep=60 disagree; give one of them"),
        ("quest(read=50)", {"read": 60}, "quest(read=50) and read=60 disagree"),
        ("quest(read=11)", {}, "read must be at least 12 tokens (the raw tail of up to 8 and one page of 4), got 11"),
        ("snapkv", {"keep": 32}, "keep must be more than window (32) tokens, got 32"),
    ],
)
def test_budgets_that_do_not_fit_the_policy_are_refused(text: str, budgets: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        bind(policy(text), small_layout(), Budgets(**budgets))

    assert message in str(error.value)
    assert isinstance(error.value, CompositionError | PolicyError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding(CodecPolicy):
    """A codec, which no session runs yet."""

    name: ClassVar[str] = "rounding"
    paper: ClassVar[str] = "none"

    def encode(self, block: torch.Tensor) -> Encoded:
        return Encoded(block.numpy().tobytes(), b"")

    def decode(self, encoded: Encoded) -> torch.Tensor:
        return torch.frombuffer(bytearray(encoded.payload), dtype=torch.float32)

    def error_bound(self, encoded: Encoded) -> float:
        return 0.0


class Sums(Newest):
    """Needs what no session computes."""

    __slots__ = ()
    name: ClassVar[str] = "sums"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.COLUMN_SUMS, Need.HIDDEN_STATES})


class Global(Quest):
    """Plans over all layers."""

    __slots__ = ()
    name: ClassVar[str] = "global"
    scope: ClassVar[Scope] = Scope.MODEL


class Compact(Newest):
    """Renumbers positions."""

    __slots__ = ()
    name: ClassVar[str] = "compact"
    position_mode: ClassVar[PositionMode] = PositionMode.COMPACT


class Picky(Newest):
    """Serves one model only."""

    __slots__ = ()
    name: ClassVar[str] = "picky"

    def check_layout(self, layout: KVLayout) -> None:
        raise CompositionError(f"picky serves 7 layers, got {len(layout.layers)}")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Rounding(), "rounding is a codec; a session runs selection, retrieval and placement policies"),
        (
            Sums(keep=8),
            (
                "sums needs HIDDEN_STATES; a session provides COLUMN_SUMS, KEYS, QUERY_MOMENTS, VALUE_NORMS, "
                "WINDOW_ATTENTION"
            ),
        ),
        (Global(read=99), "global plans over all layers at once; only selection policies may"),
        (Compact(keep=8), "compact renumbers positions; only what evicts at every step may"),
        (
            StreamingLLM(keep=8, positions="compact"),
            "streamingllm renumbers positions, and how layer 0 rotates (RoPE) is not known; take another policy",
        ),
        (
            ExpectedAttention(keep=8),
            "expected_attention asks for vectors before rotation, and how layer 0 rotates (RoPE) is not known",
        ),
        (
            D2O(keep=99, when="step") | Rounding(),
            "d2o merges tokens at every step, and rounding writes a block once, when it is sealed",
        ),
        (
            H2O(keep=99) | Quest(read=99),
            "h2o evicts by the attention of every step, and quest leaves pages unread",
        ),
        (
            D2O(keep=99, when="step") | Quest(read=99),
            "d2o evicts by the attention of every step, and quest leaves pages unread",
        ),
        (
            StreamingLLM(keep=9) | Quest(read=99),
            "streamingllm evicts at every step, so there are no sealed pages for quest to choose from",
        ),
        (Picky(keep=8), "picky serves 7 layers, got 3"),
        (Quest(read=99) | Compact(keep=8), "compact renumbers positions"),
    ],
    ids=lambda value: " and ".join(part.name for part in value.parts) if isinstance(value, Policy) else "",
)
def test_what_a_session_cannot_run_is_refused(chosen: Policy, message: str) -> None:
    with pytest.raises(CompositionError) as error:
        bind(chosen, small_layout(), Budgets())

    assert message in str(error.value)


@pytest.mark.parametrize("chosen", [StreamingLLM(keep=8, positions="compact"), ExpectedAttention(keep=8)])
def test_rotations_that_change_with_the_length_are_refused(chosen: Policy) -> None:
    rope = Rope(frequencies=(1.0, 0.1), changes="the frequencies of dynamic RoPE depend on the length of the text")

    with pytest.raises(
        CompositionError, match=r"one rotation for each position: the frequencies of dynamic RoPE depend"
    ):
        bind(chosen, small_layout(rope=rope), Budgets())
    assert bind(chosen, small_layout(rope=Rope(frequencies=(1.0, 0.1))), Budgets()).keep == (8, 8, 8)


def test_a_policy_over_the_model_needs_a_place_for_the_prompt() -> None:
    with pytest.raises(
        CompositionError, match=r"d2o evicts when the last layer has seen the prompt.* add a host or nvme"
    ):
        open_memory(policy_text="d2o(sinks=1, recent=3)", keep=12, device=200_000, host=None)
    open_memory(policy_text="d2o(sinks=1, recent=3)", keep=12, device=200_000).close()
    open_memory(policy_text="d2o(sinks=1, recent=3)", keep=12, host=None).close()


def test_a_policy_of_somebody_else_is_found_by_its_name(third_party: dict[str, registry.Entry]) -> None:
    registry.policies.register("newest", f"{__name__}:Newest")
    built = policy("newest(keep=40) | quest(read=20)")

    assert {role for part in built.parts for role in part.roles} == {Role.SELECTION, Role.RETRIEVAL}
    assert bind(built, small_layout(), Budgets()).keep == (40,) * 3


@pytest.mark.parametrize("target", ["builtins:dict", f"{__name__}:SCALAR", "kvtier.core.policy:SelectionPolicy"])
def test_a_name_that_leads_to_no_policy_is_refused(third_party: dict[str, registry.Entry], target: str) -> None:
    registry.policies.register("odd", target)

    with pytest.raises(PolicyError, match=r"odd is registered as .*, which is no dataclass derived from Policy"):
        policy("odd")


SCALAR = 3


def test_every_error_is_a_config_error() -> None:
    assert issubclass(PolicyError, ConfigError)
    assert issubclass(CompositionError, ConfigError)
    assert issubclass(ConfigError, KVTierError)
    assert issubclass(ConfigError, ValueError)
