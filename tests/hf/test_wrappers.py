"""A wrapper of a model is patched and unpatched as the model inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import fierpatch
from hf.fingerprint import fingerprint, registered
from hf.models import prompt, tiny_model

BUDGET = {"budget": 24, "dense_layers": 0}


def compiled(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


def data_parallel(model: PreTrainedModel) -> Any:
    """What DistributedDataParallel looks like from outside, too."""
    return nn.DataParallel(model)


def compiled_in_data_parallel(model: PreTrainedModel) -> Any:
    return data_parallel(compiled(model))


def lora(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


def compiled_lora(model: PreTrainedModel) -> Any:
    return compiled(lora(model))


WRAPPERS = (compiled, data_parallel, compiled_in_data_parallel, lora, compiled_lora)
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_wrapper
def test_the_model_inside_is_patched_and_unpatched(wrap: Callable[[PreTrainedModel], Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    wrapper = wrap(model)
    stock = model.generate(prompt(60), max_new_tokens=8)
    before = fingerprint(model), registered()
    handle = fierpatch.apply(wrapper, **BUDGET)
    assert handle.model is model
    patched = model.generate(prompt(60), max_new_tokens=8)
    assert not torch.equal(patched, stock)
    if hasattr(wrapper, "generate"):
        assert torch.equal(wrapper.generate(input_ids=prompt(60), max_new_tokens=8), patched)
    fierpatch.remove(wrapper)
    assert (fingerprint(model), registered()) == before
    assert torch.equal(model.generate(prompt(60), max_new_tokens=8), stock)


@every_wrapper
def test_a_patch_put_on_through_a_wrapper_comes_off_without_it_and_the_other_way_round(
    wrap: Callable[[PreTrainedModel], Any],
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    wrapper = wrap(model)
    first = fierpatch.apply(wrapper, **BUDGET)
    fierpatch.remove(model)
    assert not first.is_attached
    second = fierpatch.apply(model, **BUDGET)
    third = fierpatch.apply(wrapper, **BUDGET)  # replaces it: a model has one patch
    assert not second.is_attached
    fierpatch.remove(wrapper)
    assert not third.is_attached


@torch.no_grad()
def test_a_step_compiled_before_the_patch_is_not_used_after_it() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    wrapper = compiled(model)
    step = torch.tensor([[5]])

    def unpatched() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        wrapper(prompt(60), past_key_values=cache)
        return wrapper(step, past_key_values=cache).logits

    stock = unpatched()
    with fierpatch.apply(wrapper, **BUDGET) as handle:
        caches = [handle.new_cache() for _ in range(2)]
        for cache in caches:
            model(prompt(60), past_key_values=cache)
        patched = wrapper(step, past_key_values=caches[0]).logits
        torch.testing.assert_close(patched, model(step, past_key_values=caches[1]).logits)
        assert (patched - stock).abs().max() > 1e-2
    torch.testing.assert_close(unpatched(), stock)
