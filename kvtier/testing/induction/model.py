"""The induction model: a Llama whose weights are set by hand, not trained, so that it continues what it saw before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier.errors import InputError
from kvtier.testing.induction.codes import assign_codes
from kvtier.testing.induction.heads import Residual, head_weights
from kvtier.testing.induction.spec import InductionSpec
from kvtier.testing.induction.words import NEEDLE_KEYS, NEEDLE_VALUES, SPECIAL_WORDS, UNK

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

__all__ = ["build_model", "save"]

_INTERMEDIATE_SIZE = 16
_LOGIT_GAIN = 32.0
_NORM_EPSILON = 1e-6


def build_model(tokenizer: PreTrainedTokenizerFast, *, spec: InductionSpec | None = None) -> LlamaForCausalLM:
    """Model over the words of a tokenizer, fp32, on the CPU, in eval mode; the same bits on every call.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        From ``build_tokenizer``.

    Raises
    ------
    InputError
        When the tokenizer lacks the needle words.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    spec = spec or InductionSpec()
    words = _words(tokenizer)
    special_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=Residual(spec).size,
        intermediate_size=_INTERMEDIATE_SIZE,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_query_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        rms_norm_eps=_NORM_EPSILON,
        tie_word_embeddings=False,
        dtype="float32",
        **special_ids,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _set_words(model, words, spec)
        for index, layer in enumerate(model.model.layers):
            _set_layer(layer, index, spec)
        model.model.norm.weight.fill_(_norm_weight(spec.num_layers, spec))
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    model.eval()
    return model


def save(directory: str | Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write weights (safetensors), tokenizer and generation settings where ``AutoModelForCausalLM`` finds them."""
    directory = Path(directory)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Words by token id."""
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in (*SPECIAL_WORDS, *NEEDLE_KEYS, *NEEDLE_VALUES) if word not in vocabulary]
    if missing:
        raise InputError(
            f"the tokenizer must hold the special words and the needle words, it lacks {len(missing)}, "
            f"first {missing[0]!r}; make it with build_tokenizer"
        )
    return sorted(vocabulary, key=lambda word: vocabulary[word])


def _set_words(model: LlamaForCausalLM, words: list[str], spec: InductionSpec) -> None:
    """Embedding rows (code, constant, flag, texture) and head rows (code, read off the output part).

    Words without a code have the flag instead, so that every row has the same norm and RMSNorm divides by a constant.
    """
    import torch

    at = Residual(spec)
    embedding = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(spec.seed)
    signs = torch.randint(0, 2, (len(words), spec.head_dim), generator=generator) * 2.0 - 1.0
    embedding[:, at.texture] = signs / math.sqrt(spec.head_dim)
    embedding[:, at.constant] = 1.0

    needle_words = {*NEEDLE_KEYS, *NEEDLE_VALUES}
    coded = [index for index, word in enumerate(words) if word == UNK or word not in SPECIAL_WORDS]
    flagged = sorted(set(range(len(words))) - set(coded))
    embedding[flagged, at.flag] = 1.0
    rows = torch.tensor(coded)[:, None]
    hot = torch.tensor(assign_codes(spec, [words[index] in needle_words for index in coded]))
    embedding[rows, at.code.start + hot] = 1 / math.sqrt(spec.hot)
    model.lm_head.weight[rows, at.output.start + hot] = _LOGIT_GAIN / math.sqrt(spec.hot)


def _set_layer(layer: LlamaDecoderLayer, index: int, spec: InductionSpec) -> None:
    """Norms that give back the stream as it is, and the heads by their roles; the MLP stays zero."""
    layer.input_layernorm.weight.fill_(_norm_weight(index, spec))
    layer.post_attention_layernorm.weight.fill_(_norm_weight(index + 1, spec))
    attention, dim = layer.self_attn, spec.head_dim
    group = spec.num_query_heads // spec.num_kv_heads
    for kv_head in range(spec.num_kv_heads):
        weights = head_weights(spec.role(index, kv_head), spec)
        # Attention divides logits by sqrt(D); half of what undoes it goes to each side.
        scale = math.sqrt(weights.gain * math.sqrt(dim))
        own = slice(kv_head * dim, (kv_head + 1) * dim)
        attention.k_proj.weight[own] = scale * weights.key
        attention.v_proj.weight[own] = weights.value
        for member in range(group):
            head = kv_head * group + member
            own = slice(head * dim, (head + 1) * dim)
            attention.q_proj.weight[own] = (1 - member / (2 * group)) * scale * weights.query
            attention.o_proj.weight[:, own] = weights.output / group


def _norm_weight(layer: int, spec: InductionSpec) -> torch.Tensor:
    """The root mean square of the stream before a layer: what RMSNorm divides by."""
    import torch

    at = Residual(spec)
    return torch.tensor(math.sqrt(at.energy(layer) / at.size + _NORM_EPSILON))
