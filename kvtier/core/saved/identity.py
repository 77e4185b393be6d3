"""What must agree before a saved session may go on: the model, its layout, the policy and its budgets of tokens."""

from __future__ import annotations

from dataclasses import fields
from hashlib import blake2b
from typing import TYPE_CHECKING

from kvtier.core.policy import Policy
from kvtier.core.prefix import canonical_bytes
from kvtier.core.saved.description import Identity, LayerIdentity
from kvtier.errors import ConfigError
from kvtier.types import LayerLayout

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["check_identity", "identity_of"]

_BUDGETS = frozenset({"keep", "read"})  # they stand beside the policies, wherever they were given
_SAID = {
    "model": "model fingerprint",
    "page_tokens": "page_tokens",
    "block_tokens": "block_tokens",
    "policies": "policies",
    "keep": "tokens kept in each layer",
    "read": "tokens read",
}


def identity_of(memory: Memory, model: str | None) -> Identity:
    """What a session of this memory is."""
    policy, layout = memory.policy, memory.layout
    return Identity(
        model=model,
        layers=tuple(_layer(layer) for layer in layout.layers),
        page_tokens=layout.page_tokens,
        block_tokens=layout.block_tokens,
        policies=tuple(_spoken(part) for part in (policy.selection, policy.retrieval) if part is not None),
        keep=policy.keep,
        read=policy.read,
    )


def check_identity(saved: Identity, here: Identity) -> None:
    """Refuse a session of another kind.

    Raises
    ------
    ConfigError
        With what differs.
    """
    for name, said in _SAID.items():
        if (was := getattr(saved, name)) != (now := getattr(here, name)):
            raise ConfigError(f"the session was saved with {said} {_shown(was)}, and here it is {_shown(now)}")
    if len(saved.layers) != len(here.layers):
        raise ConfigError(f"the session was saved with {len(saved.layers)} layers, and here are {len(here.layers)}")
    for index, (was, now) in enumerate(zip(saved.layers, here.layers, strict=True)):
        for name in LayerIdentity.model_fields:
            if getattr(was, name) != getattr(now, name):
                raise ConfigError(
                    f"layer {index} was saved with {name} {_shown(getattr(was, name))}, and here it is "
                    f"{_shown(getattr(now, name))}"
                )


def _layer(layer: LayerLayout) -> LayerIdentity:
    rope = layer.rope
    if rope is not None:
        said = canonical_bytes([list(rope.frequencies), rope.scaling, rope.changes])
        rope_digest = blake2b(said, digest_size=16, person=b"kvtier.rope").hexdigest()
    return LayerIdentity(
        query_heads=layer.num_query_heads,
        kv_heads=layer.num_kv_heads,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        dtype=layer.dtype,
        window=layer.window,
        rope=None if rope is None else rope_digest,
    )


def _spoken(policy: Policy) -> str:
    """Name and hyper-parameters, as one would write them."""
    held = sorted(item.name for item in fields(policy) if item.name not in _BUDGETS)  # type: ignore[arg-type]
    return f"{policy.name}({', '.join(f'{name}={getattr(policy, name)!r}' for name in held)})"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
