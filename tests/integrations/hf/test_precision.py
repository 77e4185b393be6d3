"""In 16 bit: logits at most twice as far from an fp64 run as those of stock SDPA."""

from collections.abc import Callable

import pytest
import torch

from kvtier.integrations.hf.patch import PatchHandle
from kvtier.testing.tiny_models import left_padded, tiny_model

Attach = Callable[..., PatchHandle]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@torch.no_grad()
def test_logits_in_16_bit(family: str, dtype: torch.dtype, under_each: Attach) -> None:
    model = tiny_model(family, dtype=dtype, num_hidden_layers=4)
    prompt = left_padded([96, 70])
    truth = tiny_model(family, dtype=dtype, num_hidden_layers=4).double()(**prompt).logits
    stock = model(**prompt).logits
    with under_each(model):
        ours = model(**prompt).logits
    real = prompt["attention_mask"].bool()
    error = (ours.double() - truth)[real]
    stock_error = (stock.double() - truth)[real]
    assert ours.dtype == dtype
    assert error.square().mean() <= 4 * stock_error.square().mean()
    assert error.abs().max() <= 2 * stock_error.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_generation_in_16_bit(dtype: torch.dtype, under_each: Attach) -> None:
    model = tiny_model("gpt_oss", dtype=dtype)
    with under_each(model):
        tokens = model.generate(**left_padded([24, 9]), do_sample=False, max_new_tokens=8)
    assert tokens.shape == (2, 32)
