"""From policies to one plan for a session: names, composition, and the checks that fail early."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from kvtier.core.policy import (
    CodecPolicy,
    Need,
    Phase,
    PlacementPolicy,
    Policy,
    PositionMode,
    RetrievalPolicy,
    Role,
    Scope,
    SelectionPolicy,
)
from kvtier.errors import CompositionError, ConfigError, PolicyError
from kvtier.registry import policies
from kvtier.types import Budgets, KVLayout

__all__ = ["BoundPolicy", "Composition", "bind", "policy"]

_PROVIDED = frozenset(
    {Need.WINDOW_ATTENTION, Need.COLUMN_SUMS, Need.QUERY_MOMENTS, Need.KEYS, Need.VALUE_NORMS},
)
_SERVED = frozenset({Role.SELECTION, Role.RETRIEVAL, Role.PLACEMENT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition(Policy):
    """Several policies of different roles, as one; made by ``a | b``."""

    name: ClassVar[str] = "composition"
    paper: ClassVar[str] = ""

    components: tuple[Policy, ...]

    def __init__(self, *, parts: tuple[Policy, ...]) -> None:
        object.__setattr__(self, "components", parts)
        for role in Role:
            holders = [part for part in parts if role in part.roles]
            if len(holders) > 1:
                raise CompositionError(
                    f"one policy per role: {' and '.join(part.name for part in holders)} both answer {role.value}; "
                    "keep one"
                )

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies in the order they were written."""
        return self.components


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundPolicy:
    """A policy with its budgets, checked against a model: what a session runs.

    Parameters
    ----------
    keep : tuple of int, optional
        Tokens kept per KV head in each layer after a prompt; None when nothing is evicted.
    read : int, optional
        Tokens read per decode step and KV head; None when everything is read.
    """

    label: str
    placement: PlacementPolicy
    selection: SelectionPolicy | None
    retrieval: RetrievalPolicy | None
    keep: tuple[int, ...] | None
    read: int | None
    lossless: bool

    @property
    def evicts_steps(self) -> bool:
        """Whether it also evicts while it decodes."""
        return self.selection is not None and self.selection.phase is Phase.DECODE


def policy(text: str | Policy) -> Policy:
    """A policy by name: ``policy("snapkv(window=32) | quest(read=512)")``.

    Raises
    ------
    PolicyError
        For a name that does not exist, a parameter it does not have, or a value out of range; the message lists what
        is allowed.
    """
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str):
        raise PolicyError(f"a policy is a name such as 'quest(read=1024)' or a Policy, got {type(text).__name__}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise PolicyError(
            f"cannot read the policy {text!r}: write names joined by '|', as 'snapkv(window=32) | quest'"
        ) from error
    return _build(tree, text)


def bind(chosen: Policy, layout: KVLayout, budgets: Budgets) -> BoundPolicy:
    """Check a policy against a model and budgets, once, before anything runs.

    Raises
    ------
    CompositionError
        With what cannot work together, and what to change.
    """
    parts = chosen.parts
    _check_merging(parts)
    for part in parts:
        _check_part(part)
        _check_rotation(part, layout)
        part.check_layout(layout)
    selection = next((part for part in parts if isinstance(part, SelectionPolicy)), None)
    retrieval = next((part for part in parts if isinstance(part, RetrievalPolicy)), None)
    if selection is not None and retrieval is not None and selection.phase is Phase.DECODE:
        raise CompositionError(
            f"{selection.name} evicts by the attention of every step, and {retrieval.name} leaves pages unread; take a "
            "policy that evicts at the end of a prompt, such as snapkv"
            if selection.needs
            else f"{selection.name} evicts at every step, so there are no sealed pages for {retrieval.name} to choose "
            "from; take a policy that evicts at the end of a prompt, such as snapkv"
        )
    if selection is not None and selection.shares_heads:
        _check_shared(selection, retrieval)
    placement = next((part for part in parts if isinstance(part, PlacementPolicy)), None) or policies.resolve("lru")()
    keep = _tokens("keep", selection, selection.keep if selection else None, budgets.keep)
    read = _tokens("read", retrieval, retrieval.read if retrieval else None, budgets.read)
    least_read = layout.block_tokens + layout.page_tokens
    if read is not None and read < least_read:
        raise CompositionError(
            f"read must be at least {least_read} tokens (the raw tail of up to {layout.block_tokens} and one page of "
            f"{layout.page_tokens}), got {read}"
        )
    return BoundPolicy(
        label=" | ".join(part.name for part in parts),
        placement=placement,
        selection=selection,
        retrieval=retrieval,
        keep=selection.allocate(layout, keep) if selection is not None and keep is not None else None,
        read=read,
        lossless=all(part.lossless for part in parts),
    )


def _build(node: ast.expr, text: str) -> Policy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _build(node.left, text) | _build(node.right, text)
    if isinstance(node, ast.Name):
        return _make(node.id, {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        names = [_keyword(item, text) for item in node.keywords]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PolicyError(f"cannot read the policy {text!r}: {twice[0]} is given more than once")
        return _make(node.func.id, {item.arg or "": _constant(item.value, text) for item in node.keywords})
    raise PolicyError(f"cannot read the policy {text!r}: write names joined by '|', as 'snapkv(window=32) | quest'")


def _keyword(item: ast.keyword, text: str) -> str:
    if item.arg is None:
        raise PolicyError(f"cannot read the policy {text!r}: parameters are written name=value")
    return item.arg


def _constant(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _constant(node.operand, text)
        if type(number) in (int, float):
            return -number
    if not isinstance(node, ast.Constant):
        raise PolicyError(f"cannot read the policy {text!r}: a parameter is a number, a string, True, False or None")
    return node.value


def _make(name: str, parameters: dict[str, Any]) -> Policy:
    try:
        kind = policies.resolve(name)
    except ConfigError as error:
        raise PolicyError(str(error)) from error
    if not (is_dataclass(kind) and isinstance(kind, type) and issubclass(kind, Policy)):
        raise PolicyError(f"{name} is registered as {kind!r}, which is no dataclass derived from Policy")
    allowed = [item.name for item in fields(kind)]
    unknown = sorted(parameters.keys() - set(allowed))
    if unknown:
        raise PolicyError(f"{name} has no parameter {unknown[0]!r}; allowed: {', '.join(allowed) or 'none'}")
    try:
        return kind(**parameters)
    except TypeError as error:
        raise PolicyError(f"{name}: {error}") from error


def _check_part(part: Policy) -> None:
    beyond = sorted(role.value for role in part.roles - _SERVED)
    if beyond:
        raise CompositionError(
            f"{part.name} is a {beyond[0]}; a session runs selection, retrieval and placement policies"
        )
    missing = sorted(need.name for need in part.needs - _PROVIDED)
    if missing:
        raise CompositionError(
            f"{part.name} needs {', '.join(missing)}; a session provides {', '.join(sorted(n.name for n in _PROVIDED))}"
        )
    if part.scope is Scope.MODEL and not isinstance(part, SelectionPolicy):
        raise CompositionError(f"{part.name} plans over all layers at once; only selection policies may")
    compacts = part.position_mode is PositionMode.COMPACT
    if compacts and not (isinstance(part, SelectionPolicy) and part.phase is Phase.DECODE):
        raise CompositionError(
            f"{part.name} renumbers positions; only what evicts at every step may, for pages keep the positions that "
            "RoPE saw"
        )


def _check_rotation(part: Policy, layout: KVLayout) -> None:
    """Refuse what undoes rotations where they are not known, or not the same for every length of the text."""
    compacts = part.position_mode is PositionMode.COMPACT
    if not compacts and not part.needs & {Need.QUERY_MOMENTS, Need.PRE_ROPE_KEYS}:
        return
    what = "renumbers positions" if compacts else "asks for vectors before rotation"
    for index, layer in enumerate(layout.layers):
        if layer.window is not None:
            continue
        if layer.rope is None:
            raise CompositionError(
                f"{part.name} {what}, and how layer {index} rotates (RoPE) is not known; take another policy, or give "
                "LayerLayout.rope"
            )
        if layer.rope.changes:
            raise CompositionError(
                f"{part.name} {what}, which needs one rotation for each position: {layer.rope.changes}"
            )


def _check_merging(parts: tuple[Policy, ...]) -> None:
    """Refuse blocks that are written once under slots that change at every step."""
    codec = next((part for part in parts if isinstance(part, CodecPolicy)), None)
    merging = next((part for part in parts if isinstance(part, SelectionPolicy) and part.merges_steps), None)
    if codec is not None and merging is not None:
        raise CompositionError(
            f"{merging.name} merges tokens at every step, and {codec.name} writes a block once, when it is sealed, so "
            "what is merged later would be missing from it; merge at the end of a prompt, or leave the codec out"
        )


def _check_shared(selection: SelectionPolicy, retrieval: RetrievalPolicy | None) -> None:
    """Refuse what pages of KV heads of different lengths cannot do."""
    if retrieval is not None:
        raise CompositionError(
            f"{selection.name} leaves each KV head its own number of pages, and {retrieval.name} ranks equally many of "
            "all; take a policy that keeps the same number in each, such as snapkv"
        )
    if selection.phase is Phase.DECODE or type(selection).merge is not SelectionPolicy.merge:
        raise CompositionError(
            f"{selection.name} shares a budget among KV heads, and so may neither evict while it decodes nor merge"
        )


def _tokens(word: str, part: Policy | None, own: int | None, given: int | None) -> int | None:
    if part is None:
        if given is not None:
            what = "evicts" if word == "keep" else "retrieves"
            raise CompositionError(f"{word}={given} was given but no policy {what}; leave it out or add one that does")
        return None
    if own is not None and given is not None and own != given:
        raise CompositionError(f"{part.name}({word}={own}) and {word}={given} disagree; give one of them")
    tokens = own if own is not None else given
    if tokens is None:
        raise CompositionError(f"{part.name} needs {word}, in tokens: {part.name}({word}=1024) or {word}=1024")
    return tokens
