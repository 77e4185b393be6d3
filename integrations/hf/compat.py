"""Every difference between transformers 5.16 and 5.23, and everything private of it that kvtier touches."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn

from kvtier.errors import InputError, MissingDependencyError, UnsupportedModelError

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.masking_utils import causal_mask_function
except ImportError as error:
    raise MissingDependencyError(
        f"kvtier.patch needs transformers 5.16 to 5.23 ({error}); pip install 'kvtier[hf]'"
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "ATTENTION_NAME",
    "CachedLayer",
    "attention_configs",
    "attention_modules",
    "cached_layers",
    "check_version",
    "columns_to_remove",
    "generation_option",
    "generation_options",
    "hooks_of",
    "implementation",
    "is_causal_pattern",
    "keeps_logits",
    "module_device",
    "register",
    "rerouted",
    "set_implementation",
    "shorter",
    "takes_attention_functions",
    "text_config",
    "unwrap",
]

ATTENTION_NAME: Final = "kvtier"
_OLDEST: Final = (5, 16)
_NEWEST: Final = (5, 23)
_CROP_BY_LENGTH_UNTIL: Final = (5, 18)

_log = logging.getLogger("kvtier.integrations.hf")


class CachedLayer(NamedTuple):
    """How transformers itself would cache a layer: class name of the cache layer, and its window in tokens."""

    kind: str
    window: int | None

    @property
    def plain(self) -> bool:
        """Whether the layer is softmax attention over all tokens or over a sliding window, and nothing else."""
        return self.kind in (DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__)


def check_version() -> None:
    """Refuse a transformers that is too old, and note one that was never tried.

    Raises
    ------
    MissingDependencyError
        Below 5.16.
    """
    if _version() < _OLDEST:
        raise MissingDependencyError(
            f"kvtier.patch needs transformers 5.16 to 5.23, got {transformers.__version__}; pip install 'kvtier[hf]'"
        )
    if _version() > _NEWEST:
        _log.warning("transformers %s is newer than what kvtier was tested with (5.23)", transformers.__version__)


def register(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make both functions known to transformers under kvtier's name; models that do not ask for it are not touched."""
    AttentionInterface.register(ATTENTION_NAME, attention)
    # Without a mask function of that name transformers would pass None, padding or not.
    AttentionMaskInterface.register(ATTENTION_NAME, mask)


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside: itself, or what a PEFT model wraps.

    Raises
    ------
    UnsupportedModelError
        For anything else.
    """
    inner = model
    if not isinstance(inner, PreTrainedModel) and callable(getattr(model, "get_base_model", None)):
        inner = model.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"patch takes a transformers PreTrainedModel or a PeftModel around one, got {type(model).__name__}; "
            "give the model itself, not a compiled or wrapped one"
        )
    return inner


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the text decoder; of most models it is the only one."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of the text decoder, in order of their layers."""
    found = [
        module
        for module in model.get_decoder().modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    ]
    return sorted(found, key=lambda module: int(module.layer_idx))


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that attention and masks of the text decoder read, each once; not those of a vision tower."""
    holders: list[Any] = [module.config for module in attention_modules(model) if hasattr(module, "config")]
    return list({id(config): config for config in [text_config(model), *holders]}.values())


def implementation(config: PreTrainedConfig) -> str | None:
    """The name of the attention function that this configuration asks for."""
    return config._attn_implementation_internal  # noqa: SLF001


def set_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Ask for an attention function in this configuration alone; the public setter also sets its sub-configurations."""
    config._attn_implementation_internal = name  # noqa: SLF001


def takes_attention_functions(model: PreTrainedModel) -> bool:
    """Whether the family calls its attention through the table of functions that ``register`` writes to."""
    return bool(type(model)._can_set_attn_implementation())  # noqa: SLF001


def cached_layers(config: PreTrainedConfig) -> list[CachedLayer]:
    """How transformers would cache each layer, read from the cache that it would make."""
    layers = DynamicCache(config=config).layers
    return [CachedLayer(type(layer).__name__, getattr(layer, "sliding_window", None)) for layer in layers]


def module_device(module: nn.Module) -> torch.device:
    """Where a module computes: its weights may wait elsewhere, and then accelerate's hooks on it or its parts know."""
    for part in module.modules():
        placed = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if placed is not None:
            return torch.device(placed)
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))


def is_causal_pattern(pattern: Callable[..., Any]) -> bool:
    """Whether a mask pattern of transformers is causal, or causal within a sliding window, and nothing more."""
    return all(
        part is causal_mask_function or _name(part).startswith("sliding_window_overlay.") for part in _combined(pattern)
    )


def columns_to_remove(requested: int, length: int) -> int:
    """Columns that ``Cache.crop(requested)`` asks to forget: a negative number is that many; 0 is none.

    Before 5.18 a positive number was the length to keep; since then it is an error.

    Raises
    ------
    InputError
        For a positive number where transformers refuses it too.
    """
    if requested <= 0:
        return -requested
    if _version() >= _CROP_BY_LENGTH_UNTIL:
        raise InputError(f"crop takes minus the number of tokens to remove, got {requested}; write crop(-{requested})")
    return max(0, length - requested)


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether ``forward`` can be told to compute the logits of the last columns only (``logits_to_keep``)."""
    return bool(model._supports_logits_to_keep())  # type: ignore[operator]  # noqa: SLF001


def generation_option(model: PreTrainedModel, name: str, call: dict[str, Any]) -> Any:
    """An option as ``generate`` will resolve it: its own argument, then the given configuration, then the model's."""
    if name in call:
        return call[name]
    for config in (call.get("generation_config"), model.generation_config):
        if (value := getattr(config, name, None)) is not None:
            return value
    return None


def shorter(model: PreTrainedModel, call: dict[str, Any], removed: int) -> dict[str, Any]:
    """The length options of ``generate`` that count the prompt, for one that is ``removed`` columns shorter."""
    changed = {}
    longest, least = (generation_option(model, name, call) for name in ("max_length", "min_length"))
    if longest is not None and generation_option(model, "max_new_tokens", call) is None:
        changed["max_length"] = longest - removed
    if least and generation_option(model, "min_new_tokens", call) is None:
        changed["min_length"] = max(0, least - removed)
    return changed


def generation_options(model: PreTrainedModel) -> frozenset[str]:
    """The names of everything that ``generate`` takes for itself, and does not hand on to the model."""
    generate: Any = getattr(type(model), "generate", None)
    parameters = () if generate is None else inspect.signature(generate).parameters
    return frozenset(parameters) | frozenset(vars(model.generation_config))


def hooks_of(module: nn.Module) -> list[str]:
    """The functions that others hooked before or after the forward of a module, by name."""
    tables = (module._forward_pre_hooks, module._forward_hooks)  # noqa: SLF001
    functions = [getattr(hook, "func", hook) for table in tables for hook in table.values()]
    names = [f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', type(hook))}" for hook in functions]
    return [name for name in names if not name.startswith(("kvtier.", "transformers."))]


def rerouted(model: PreTrainedModel) -> str:
    """Why what runs is not what ``generate`` was given, for this call alone; empty when it is."""
    if "prepare_inputs_for_generation" in vars(model):
        return "an adapter puts tokens of its own before the prompt"
    if any(hasattr(module, "merged_adapters") and hooks_of(module) for module in model.modules()):
        return "each row has an adapter of its own"
    return ""


def _version() -> tuple[int, int]:
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def _combined(pattern: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The patterns whose intersection this is: what ``and_masks`` closed over, or the pattern itself."""
    if not _name(pattern).startswith("and_masks."):
        yield pattern
        return
    for cell in getattr(pattern, "__closure__", None) or ():
        for part in cell.cell_contents:
            yield from _combined(part)


def _name(pattern: Callable[..., Any]) -> str:
    return getattr(pattern, "__qualname__", "")
