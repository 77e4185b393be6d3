"""``fingerprint``: what a model computes with, as one digest, so that stored keys and values are never mistaken."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from torch import nn

from kvtier.integrations.hf import compat
from kvtier.integrations.hf.tensor_digest import TensorState, probe, state_of, tensor_digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FULL_BYTES", "fingerprint", "rope_kinds"]

FULL_BYTES: Final = 4 << 30
"""Up to so many bytes of weights every byte is hashed; above, blocks of each tensor and the sum of all its words."""

_FORMAT: Final = "kvtier model fingerprint 1"
# What a configuration says beyond what a model computes: it changes with saving, loading and versions.
_NOT_THE_MODEL: Final = frozenset(
    {"_commit_hash", "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "output_attentions",
     "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache"}
)  # fmt: skip


@dataclass(slots=True)
class _Seen:
    """What was hashed of a model, and how its tensors looked then."""

    adapters: str
    digests: dict[str, bytes] = field(default_factory=dict)
    states: dict[str, TensorState] = field(default_factory=dict)


_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


def fingerprint(model: Any, *, tokenizer: Any = None) -> str:
    """Name a model by what it computes with: equal models have equal names, in every process and on every device.

    Covered are the class, the configuration (RoPE and sliding windows with it), every parameter and buffer with its
    name, shape, dtype and bytes, the adapters that are active or merged, the names of forward hooks below the model,
    and the tokenizer if one is given.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A model with its weights in memory.
    tokenizer : optional
        A tokenizer of transformers, for stores that must not outlive a change of it.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    UnsupportedModelError
        When weights are not in memory, or have no bytes that could be read.

    Notes
    -----
    Up to `FULL_BYTES` of weights every byte is hashed (xxh3-128), so any change is seen. Above, each tensor
    contributes blocks at its two ends and at even distances, and the sum of all its 64-bit words: a change of one
    element, or of many, is seen unless it keeps the sum and falls between the blocks, as swapping two aligned words
    does.

    Hashes are kept while a model lives, and made anew for tensors that were replaced, changed in place, or fail a
    probe of 16 of their elements. A write through ``tensor.data`` that misses the probed elements is not noticed.
    Neither are attributes that are no parameter, buffer or field of the configuration, nor what a hook does. The hash
    defends against mistakes, not against somebody who makes weights in order to collide; give tenants who distrust
    each other names of their own. Safe to call from several threads.
    """
    inner = compat.unwrap(model)
    adapters = _adapters(inner)
    hooks = [[name, compat.hooks_of(module)] for name, module in inner.named_modules() if name]
    whole = hashlib.blake2b(digest_size=32)
    _feed(whole, _FORMAT)
    _feed(whole, type(inner).__name__)
    _feed(whole, _configuration(inner))
    _feed(whole, adapters)
    _feed(whole, json.dumps([entry for entry in hooks if entry[1]]))
    for name, digest in sorted(_tensor_digests(inner, adapters).items()):
        _feed(whole, name)
        _feed(whole, digest)
    _feed(whole, "" if tokenizer is None else _tokenizer(tokenizer))
    return whole.hexdigest()


def rope_kinds(model: PreTrainedModel) -> frozenset[str]:
    """The kinds of RoPE that a model uses, as its configuration names them."""
    parameters = getattr(compat.text_config(model), "rope_parameters", None) or {}
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return frozenset(str(each["rope_type"]) for each in sets if each.get("rope_type"))


def _tensor_digests(model: nn.Module, adapters: str) -> dict[str, bytes]:
    """A digest of every parameter and buffer by name; only of those that may have changed are they made again."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    seen = _seen.get(model)
    # Merging an adapter writes through `tensor.data`, which no version counts.
    before = seen if seen is not None and seen.adapters == adapters else _Seen(adapters)
    probes = probe(tensors)
    states = {name: state_of(tensor, probes[name]) for name, tensor in tensors.items()}
    changed = {name: tensor for name, tensor in tensors.items() if before.states.get(name) != states[name]}
    kept = {name: digest for name, digest in before.digests.items() if name in tensors and name not in changed}
    whole = sum(tensor.nbytes for tensor in tensors.values()) <= FULL_BYTES
    digests = {**kept, **tensor_digests(changed, whole=whole)}
    _seen[model] = _Seen(adapters, digests, states)
    return digests


def _configuration(model: PreTrainedModel) -> str:
    return json.dumps(_cleaned(model.config.to_dict()), sort_keys=True, default=str)


def _cleaned(value: Any) -> Any:
    """A configuration without what does not tell models apart, at any depth; keys as text, as files write them."""
    if isinstance(value, dict):
        return {str(key): _cleaned(item) for key, item in value.items() if key not in _NOT_THE_MODEL}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return value


def _adapters(model: nn.Module) -> str:
    """Which adapters act in which module, and how strongly; their weights are parameters like all others."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            scaling = getattr(module, "scaling", None)
            found.append(
                [
                    name,
                    bool(getattr(module, "disable_adapters", False)),
                    list(module.active_adapters),
                    list(module.merged_adapters),
                    dict(scaling) if isinstance(scaling, dict) else None,
                ]
            )
    return json.dumps(found, sort_keys=True, default=str)


def _tokenizer(tokenizer: Any) -> str:
    """Its whole definition, or, where it has none to show, its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return json.dumps(sorted(tokenizer.get_vocab().items()))


def _feed(digest: hashlib.blake2b, part: str | bytes) -> None:
    """Add a part with its length, so that no two lists of parts read alike."""
    data = part.encode() if isinstance(part, str) else part
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
