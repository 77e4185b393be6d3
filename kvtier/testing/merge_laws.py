"""The laws of merging: subclass `MergeLaws` in a test file and they run on your selection policy's ``merge``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from kvtier.core.policy import KeepPlan, MergePlan, SelectionPolicy
from kvtier.core.stats import SlotView
from kvtier.testing.draws import DTYPES, draw_levels, draw_values, table
from kvtier.testing.law import PolicyLaws, law, require

__all__ = ["MergeCase", "MergeLaws", "merge_cases", "merged"]

_SLACK = 1e-5  # of weights and of sums of weights in fp32


@dataclass(frozen=True)
class MergeCase:
    """Keys [B, Hk, T, D] at positions [B, Hk, T], and the slots that stay [B, Hk, K]."""

    keys: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor

    def plan(self, policy: SelectionPolicy, memory: torch.Tensor | None = None) -> MergePlan:
        """What the policy folds where, remembering [B, Hk, S] of merges before; nothing when it merges nothing."""
        protected = policy.protected(self.positions)
        view = SlotView(positions=self.positions, protected=protected, keys=self.keys, memory=memory)
        plan = policy.merge(view, KeepPlan(self.keep))
        if plan is not None:
            return plan
        none = torch.zeros(*self.keys.shape[:2], 0, dtype=torch.int64)
        return MergePlan(none, none, none.float())

    def only(self, row: int, head: int) -> MergeCase:
        """One row and KV head."""
        pick = (slice(row, row + 1), slice(head, head + 1))
        return MergeCase(self.keys[pick], self.positions[pick], self.keep[pick])

    def describe(self) -> str:
        """The case in words."""
        rows, heads, slots = self.positions.shape
        return (
            f"{rows} rows, {heads} KV heads, {slots} slots, {self.keys.dtype}; {table('kept', self.keep)}; "
            f"{table('keys', self.keys)}"
        )


@st.composite
def merge_cases(draw: st.DrawFn) -> MergeCase:
    """Cases of up to 3 rows, 2 KV heads and 12 slots of which some stay, in fp32 and bf16."""
    rows, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 12))
    keys = draw_values(draw, (rows, heads, slots, draw(st.integers(1, 4))))
    keys = keys.to(draw(st.sampled_from(DTYPES)))
    keep = draw_levels(draw, (rows, heads, slots), 256).argsort(dim=-1, stable=True)[..., : draw(st.integers(1, slots))]
    positions = torch.arange(slots).expand(rows, heads, slots)
    return MergeCase(keys, positions, keep.sort(-1).values)


def merged(plan: MergePlan, values: torch.Tensor) -> torch.Tensor:
    """What the slots of values [B, Hk, T, D] hold after a merge, in fp64; slots that take nothing keep theirs."""
    result = values.double()
    for row, head, entries in _flat(plan):
        taken: dict[int, torch.Tensor] = {}
        for src, dst, weight in entries:
            taken[dst] = taken.get(dst, 0.0) + weight * values[row, head, src].double()
        for dst, vector in taken.items():
            result[row, head, dst] = vector
    return result


class MergeLaws(PolicyLaws):
    """What every merge keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMyMerge(MergeLaws):
            @pytest.fixture
            def policy(self) -> SelectionPolicy:
                return MyMerging(keep=64)
    """

    @law(
        "M1",
        "a merge is a convex combination: weights are at least 0 and those of one slot sum to 1",
        case=merge_cases(),
    )
    def test_merges_are_convex(self, policy: SelectionPolicy, case: MergeCase) -> None:
        plan = case.plan(policy)
        for place, entries in _entries(plan):
            sums: dict[int, float] = {}
            for src, dst, weight in entries:
                require(weight >= 0, f"{place}: slot {src} goes into slot {dst} with weight {weight:g}")
                sums[dst] = sums.get(dst, 0.0) + weight
            for dst, total in sums.items():
                parts = ", ".join(f"{weight:g} of slot {src}" for src, into, weight in entries if into == dst)
                require(abs(total - 1) <= _SLACK, f"{place}: slot {dst} becomes {parts}: {total:g} in all")

    @law("M2", "equal keys stay what they are", case=merge_cases())
    def test_constant_vectors_are_fixed_points(self, policy: SelectionPolicy, case: MergeCase) -> None:
        same = MergeCase(case.keys[:, :, :1].expand_as(case.keys).contiguous(), case.positions, case.keep)
        plan = same.plan(policy)
        require(bool(plan.weight.isfinite().all()), "a weight is not finite")
        off = float((merged(plan, same.keys) - same.keys.double()).abs().max())
        require(
            off <= _SLACK * (1 + float(same.keys.abs().max())), f"all keys are equal, and a merge moves one by {off:g}"
        )

    @law("M3", "when nothing is dropped nothing is merged", case=merge_cases())
    def test_nothing_dropped_nothing_merged(self, policy: SelectionPolicy, case: MergeCase) -> None:
        plan = MergeCase(case.keys, case.positions, case.positions).plan(policy)
        for place, entries in _entries(plan):
            others = [(src, dst) for src, dst, _ in entries if src != dst]
            require(not others, f"{place}: every slot stays, and slots {others} are merged")

    @law("M4", "what is dropped goes into what is kept", case=merge_cases())
    def test_sources_are_dropped_and_targets_kept(self, policy: SelectionPolicy, case: MergeCase) -> None:
        plan, must = case.plan(policy), tuple(case.positions.shape[:2])
        require(
            tuple(plan.src.shape[:2]) == must, f"plans are {list(must)} rows and KV heads, got {list(plan.src.shape)}"
        )
        kept = case.keep.flatten(0, 1).tolist()
        for (place, entries), stays in zip(_entries(plan), kept, strict=True):
            for src, dst, _ in entries:
                require(dst in stays, f"{place}: slot {src} goes into slot {dst}, which is not kept; {stays} are")
                require(src == dst or src not in stays, f"{place}: slot {src} is kept and goes into slot {dst}")

    @law("M5", "a dropped slot goes into one slot, once", case=merge_cases())
    def test_sources_are_used_once(self, policy: SelectionPolicy, case: MergeCase) -> None:
        for place, entries in _entries(case.plan(policy)):
            sources = [src for src, dst, _ in entries if src != dst]
            twice = sorted({src for src in sources if sources.count(src) > 1})
            require(not twice, f"{place}: slots {twice} are merged more than once")

    @law("M6", "a row and KV head is merged the same in any company", case=merge_cases())
    def test_rows_and_heads_are_merged_alone(self, policy: SelectionPolicy, case: MergeCase) -> None:
        together = _entries(case.plan(policy))
        heads = case.positions.shape[1]
        for index, (place, entries) in enumerate(together):
            alone = _entries(case.only(index // heads, index % heads).plan(policy))[0][1]
            require(_same(alone, entries), f"{place}: {_told(alone)} alone, {_told(entries)} in company")

    @law("M13", "a merge is the same whatever was merged before", case=merge_cases(), other=merge_cases())
    def test_no_state_survives(self, policy: SelectionPolicy, case: MergeCase, other: MergeCase) -> None:
        first = _entries(case.plan(policy))
        other.plan(policy)
        for (place, before), (_, after) in zip(first, _entries(case.plan(policy)), strict=True):
            require(_same(before, after), f"{place}: {_told(before)} first, {_told(after)} the second time")

    @law("M14", "what a merge remembers belongs to its row and KV head", case=merge_cases(), then=st.integers(1, 3))
    def test_memory_does_not_leak(self, policy: SelectionPolicy, case: MergeCase, then: int) -> None:
        heads = case.positions.shape[1]
        for index, (place, entries) in enumerate(_entries(_threaded(case, policy, then))):
            alone = _entries(_threaded(case.only(index // heads, index % heads), policy, then))[0][1]
            require(
                _same(alone, entries), f"{place}: {_told(alone)} alone, {_told(entries)} in company, merge {then + 1}"
            )


def _threaded(case: MergeCase, policy: SelectionPolicy, then: int) -> MergePlan:
    """The last of ``then`` + 1 merges in a row, of slots that turn from one to the next."""
    plan = case.plan(policy)
    for turn in range(1, then + 1):
        plan = replace(case, keys=case.keys.roll(turn, dims=2)).plan(policy, plan.memory)
    return plan


_Entry = tuple[int, int, float]


def _entries(plan: MergePlan) -> list[tuple[str, list[_Entry]]]:
    """The entries of each row and head that mean something, sorted, and their place in words."""
    return [(f"row {row}, KV head {head}", entries) for row, head, entries in _flat(plan)]


def _flat(plan: MergePlan) -> list[tuple[int, int, list[_Entry]]]:
    found = []
    for row, parts in enumerate(zip(plan.src.tolist(), plan.dst.tolist(), plan.weight.tolist(), strict=True)):
        for head, entries in enumerate(zip(*parts, strict=True)):
            found.append((row, head, sorted(entry for entry in zip(*entries, strict=True) if entry[2] != 0)))
    return found


def _same(one: list[_Entry], other: list[_Entry]) -> bool:
    return [entry[:2] for entry in one] == [entry[:2] for entry in other] and all(
        abs(a[2] - b[2]) <= _SLACK for a, b in zip(one, other, strict=True)
    )


def _told(entries: list[_Entry]) -> str:
    return ", ".join(f"{src}->{dst} ({weight:.3g})" for src, dst, weight in entries) or "nothing"
