"""Models placed by accelerate, and models on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvtier
from kvtier.integrations.hf.layout import layer_devices
from kvtier.integrations.hf.patch import PatchHandle
from kvtier.testing.tiny_models import left_padded, tiny_model

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

Attach = Callable[..., PatchHandle]

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}


def dispatched(model: Any) -> Any:
    return accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


def offloaded(model: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.:UserWarning"
)  # 5.16 takes offloaded weights for a mistake
@pytest.mark.parametrize("place", [dispatched, offloaded])
def test_models_under_accelerate(place: Callable[[Any], Any], under_each: Attach) -> None:
    prompt = left_padded([20, 11])
    stock = tiny_model("mistral").generate(**prompt, **GREEDY)
    model = place(tiny_model("mistral"))
    assert layer_devices(model) == (torch.device("cpu"),) * 2
    with under_each(model) as handle:
        cache = handle.new_cache()
        assert model.generate(**prompt, **GREEDY, past_key_values=cache).tolist() == stock.tolist()
        assert handle.recover(cache).get_seq_length() == 27
    assert model.generate(**prompt, **GREEDY).tolist() == stock.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_models_on_a_gpu(family: str) -> None:
    model = tiny_model(family).cuda()
    prompt = {name: tensor.cuda() for name, tensor in left_padded([20, 11]).items()}
    stock = model.generate(**prompt, **GREEDY)
    with kvtier.patch(model, "full"):
        assert model.generate(**prompt, **GREEDY).tolist() == stock.tolist()


@pytest.mark.gpu
def test_layers_on_two_devices() -> None:
    model = tiny_model("llama")
    prompt = {name: tensor.cuda() for name, tensor in left_padded([20, 11]).items()}
    stock = tiny_model("llama").cuda().generate(**prompt, **GREEDY)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0}
    split = accelerate.dispatch_model(model, {**places, "model.rotary_emb": 0, "lm_head": 0})
    with kvtier.patch(split, "full"):
        assert split.generate(**prompt, **GREEDY).tolist() == stock.tolist()
