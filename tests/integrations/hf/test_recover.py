"""After lost pages: the cache is rebuilt from what it was fed, and generation goes on as if nothing had happened."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtier.errors import PagesLostError, SessionStateError
from kvtier.integrations.hf.layout import layout_of
from kvtier.integrations.hf.patch import PatchHandle, attach
from kvtier.testing.oracles import PlainMemory, PlainSession
from kvtier.testing.tiny_models import left_padded, tiny_model

Attach = Callable[..., PatchHandle]

PROMPT = left_padded([20, 11])
GREEDY: dict[str, Any] = {"do_sample": False}


class LossyMemory(PlainMemory):
    """Plain sessions; the attend calls whose numbers are in ``losses`` find their pages gone."""

    def __init__(self, model: Any, losses: set[int], **options: Any) -> None:
        super().__init__(layout_of(model), **options)
        self.losses = losses
        self.attended = 0

    def session(self) -> PlainSession:
        session = super().session()
        attend = session.attend

        def lossy(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.attended += 1
            if self.attended in self.losses:
                raise PagesLostError("pages 3 and 4 of layer 1 are damaged; call handle.recover()")
            return attend(*args, **kwargs)

        session.attend = lossy  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize("loss", [1, 2, 3, 8, 13], ids=lambda loss: f"attend_{loss}")
@pytest.mark.parametrize("own", [True, False], ids=["cache_of_generate", "cache_of_caller"])
def test_generation_goes_on_where_it_broke(loss: int, own: bool) -> None:
    model = tiny_model("llama")
    stock = model.generate(**PROMPT, **GREEDY, max_new_tokens=10)
    with attach(model, LossyMemory(model, {loss})) as handle:
        cache = None if own else handle.new_cache()
        with pytest.raises(PagesLostError):
            model.generate(**PROMPT, **GREEDY, max_new_tokens=10, past_key_values=cache)
        recovered = handle.recover()
        assert own or recovered is cache
        ids = recovered.input_ids
        assert ids.tolist() == stock[:, : ids.shape[1]].tolist()
        assert ids.shape[1] == 20 + (loss - 1) // 2
        mask = torch.cat([PROMPT["attention_mask"], torch.ones(2, ids.shape[1] - 20, dtype=torch.long)], dim=1)
        done = model.generate(
            ids, attention_mask=mask, **GREEDY, max_new_tokens=30 - ids.shape[1], past_key_values=recovered
        )
        assert done.tolist() == stock.tolist()


def test_a_cache_that_failed_is_refused_until_it_is_recovered() -> None:
    model = tiny_model("llama")
    ids, token = left_padded([20])["input_ids"], torch.tensor([[5]])
    stock = model(torch.cat([ids, token], dim=1)).logits[:, -1]
    with attach(model, LossyMemory(model, {4, 6})) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        with pytest.raises(PagesLostError):
            model(token, past_key_values=cache)
        with pytest.raises(SessionStateError, match=r"handle\.recover\(cache\)"):
            model(token, past_key_values=cache)
        # The second loss strikes the recovery itself, which can be tried again.
        with pytest.raises(PagesLostError):
            handle.recover(cache)
        with pytest.raises(SessionStateError, match=r"handle\.recover\(cache\)"):
            model(token, past_key_values=cache)
        handle.recover(cache)
        assert cache.get_seq_length() == 20
        assert cache.input_ids.tolist() == [[*ids[0].tolist(), 5]]
        torch.testing.assert_close(model(token, past_key_values=cache).logits[:, -1], stock)
        assert cache.get_seq_length() == 21


def test_recovery_runs_in_chunks_that_fit() -> None:
    model = tiny_model("mistral")
    memory = LossyMemory(model, {9}, max_prefill=6)
    widths: list[int] = []
    with attach(model, memory) as handle, torch.no_grad():
        cache = handle.new_cache()
        with pytest.raises(PagesLostError):
            model.generate(**PROMPT, **GREEDY, max_new_tokens=4, past_key_values=cache)
        model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        handle.recover(cache)
    assert widths == [6, 6, 2, 6]


def test_which_cache_must_be_known(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        handle.new_cache()
        with pytest.raises(SessionStateError, match=r"0 caches failed; name the one to recover"):
            handle.recover()


def test_a_healthy_cache_can_be_rebuilt(under_each: Attach) -> None:
    model = tiny_model("gpt_oss")
    stock = model.generate(**PROMPT, **GREEDY, max_new_tokens=6)
    with under_each(model) as handle, torch.no_grad():
        cache = handle.new_cache()
        half = model.generate(**PROMPT, **GREEDY, max_new_tokens=3, past_key_values=cache)
        assert handle.recover(cache) is cache
        mask = torch.cat([PROMPT["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
        assert (
            model.generate(half, attention_mask=mask, **GREEDY, max_new_tokens=3, past_key_values=cache).tolist()
            == stock.tolist()
        )


def test_embeddings_cannot_be_fed_again(attached: Attach) -> None:
    model = tiny_model("llama")
    with attached(model) as handle:
        cache = handle.new_cache()
        model(inputs_embeds=torch.randn(1, 4, 64), past_key_values=cache)
        with pytest.raises(SessionStateError, match="fed embeddings"):
            handle.recover(cache)
