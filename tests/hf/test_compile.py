"""Decode over a static cache compiles into one graph, which serves every step and every cache."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, PreTrainedModel

import fierpatch
from fierpatch import FierCache
from fierpatch.cache import LayerCache
from fierpatch.errors import CapacityError
from hf.agreement import FULL_BUDGET
from hf.models import left_padded, prompt, tiny_config, tiny_model

NUM_STEPS = 22
STATIC = {"cache_implementation": "static"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_layers(family: str, base: str | None = None) -> PreTrainedModel:
    """A model whose first layer is dense or sliding under ``dense_layers=1``, the second sparse."""
    kinds = tiny_config(family).layer_types if family in ("gemma2", "gemma3", "gpt_oss") else None
    changes = {} if kinds is None else {"layer_types": kinds[:2]}
    return tiny_model(family, base, num_hidden_layers=2, **changes)


def compile_config(backend: str = "aot_eager") -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)
    config._compile_all_devices = True  # generate compiles on a GPU only, unless told
    return config


@torch.no_grad()
def decode(model: PreTrainedModel, step: Any, cache: FierCache, tokens: Tensor) -> Tensor:
    """A prompt through the model, then single tokens through `step`: the tokens chosen."""
    token = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
    chosen = [token]
    for _ in range(NUM_STEPS):
        token = step(token, past_key_values=cache).logits.argmax(-1)
        chosen.append(token)
    return torch.cat(chosen, 1)


@pytest.mark.parametrize(
    ("family", "base", "num_graphs"),
    [
        ("llama", "sdpa", 1),
        ("llama", "eager", 1),
        ("qwen3", "sdpa", 1),
        # A static sliding layer of transformers counts on the host: one graph for the first count,
        # one for any.
        ("gemma3", "sdpa", 2),
        ("gpt_oss", "eager", 2),
    ],
)
def test_decode_is_one_graph_for_all_steps_and_caches(
    family: str, base: str, num_graphs: int
) -> None:
    model = two_layers(family, base)
    prompts = (prompt(40), prompt(47, seed=1))
    with fierpatch.apply(model, budget=24, compile=True, dense_layers=1) as handle:
        eager = [decode(model, model.forward, handle.new_cache(50), each) for each in prompts]
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(model.forward, fullgraph=True, backend=counter)
        compiled = [decode(model, step, handle.new_cache(50), prompts[0])]
        assert counter.frame_count == num_graphs
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled.append(decode(model, step, handle.new_cache(60), prompts[1]))
    assert counter.frame_count == num_graphs
    assert torch.equal(torch.stack(compiled), torch.stack(eager))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")  # its own
def test_inductor_gives_the_tokens_of_eager() -> None:
    model = two_layers("llama")
    with fierpatch.apply(model, budget=24, compile=True, dense_layers=1) as handle:
        eager = decode(model, model.forward, handle.new_cache(50), prompt(40))
        step = torch.compile(model.forward, fullgraph=True)
        compiled = decode(model, step, handle.new_cache(50), prompt(40))
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize(("family", "base"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_compiled_generate_gives_the_tokens_of_the_unpatched_model(family: str, base: str) -> None:
    model = two_layers(family, base)
    inputs = left_padded(60, (0, 9))
    stock = model.generate(**inputs, max_new_tokens=12)
    with fierpatch.apply(model, budget=FULL_BUDGET, dense_layers=1):
        options = {"max_new_tokens": 12, "compile_config": compile_config(), **STATIC}
        assert torch.equal(model.generate(**inputs, **options), stock)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(model.generate(**inputs, **options), stock)
            model.generate(prompt(71, 2), **options)  # another length, without padding


def test_compiled_runs_leave_the_keys_and_values_of_one_run() -> None:
    """The compiler leaves a cycle, once; the layers in it are the next run's all the same."""
    model = two_layers("llama")
    options = {"max_new_tokens": 4, "compile_config": compile_config(), **STATIC}
    gc.collect()
    gc.disable()
    try:
        with fierpatch.apply(model, budget=24, dense_layers=1):
            for _ in range(3):
                model.generate(prompt(40), **options)
                assert len([each for each in gc.get_objects() if type(each) is LayerCache]) == 2
        assert not [each for each in gc.get_objects() if type(each) is LayerCache]
    finally:
        gc.enable()


def test_compiled_generate_agrees_where_the_prompt_comes_in_chunks() -> None:
    """The chunks are compiled too, and the first of them allocates the cache."""
    model = two_layers("llama")
    stock = model.generate(prompt(64), max_new_tokens=8)
    with (
        torch._dynamo.config.patch(recompile_limit=8),  # which prefill in chunks raises for good
        fierpatch.apply(model, budget=FULL_BUDGET, dense_layers=1),
    ):
        chunked = model.generate(
            prompt(64),
            max_new_tokens=8,
            prefill_chunk_size=32,
            compile_config=compile_config(),
            **STATIC,
        )
    assert torch.equal(chunked, stock)


def test_the_compiled_graph_goes_with_the_patch_and_the_one_before_it_comes_back() -> None:
    model = two_layers("llama")
    options = {"max_new_tokens": 4, "compile_config": compile_config(), **STATIC}
    stock = model.generate(prompt(40), **options)
    before = model.__dict__["_compiled_call"]
    with fierpatch.apply(model, budget=21, dense_layers=1):
        assert "_compiled_call" not in model.__dict__
        model.generate(prompt(40), **options)
        assert model.__dict__["_compiled_call"] is not before
    assert model.__dict__["_compiled_call"] is before
    assert torch.equal(model.generate(prompt(40), **options), stock)


def test_the_longest_cache_that_was_asked_for_is_used_at_once() -> None:
    """`max_cache_len` makes room for later, longer calls, so that they find the graph compiled."""
    model = two_layers("llama")
    with fierpatch.apply(model, budget=FULL_BUDGET, dense_layers=1):
        options = {"max_new_tokens": 3, "max_cache_len": 600, **STATIC}
        options |= {"compile_config": compile_config(), "return_dict_in_generate": True}
        short = model.generate(prompt(40), **options)
        with torch.compiler.set_stance("fail_on_recompile"):
            long = model.generate(prompt(590), **options)
    assert short.past_key_values.get_max_length() == long.past_key_values.get_max_length() == 1024


def test_a_static_cache_keeps_its_buffers_where_they_are() -> None:
    model = two_layers("llama")
    with fierpatch.apply(model, budget=24, compile=True, dense_layers=1) as handle:
        cache = handle.new_cache(100)
        decode(model, model.forward, cache, prompt(40, 2))
        store = cache.stores[1]

        def addresses() -> list[int]:
            tensors = (store.keys, store.values, store.counters, *store.state)
            return [tensor.data_ptr() for tensor in tensors]

        before = addresses()
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-5)
        cache.reset()
        decode(model, model.forward, cache, prompt(30, 2))
        assert addresses() == before


def test_a_length_read_from_a_static_cache_stays_as_it_was_read() -> None:
    model = two_layers("llama")
    with fierpatch.apply(model, budget=24, compile=True) as handle, torch.no_grad():
        cache = handle.new_cache(100)
        model(prompt(40), past_key_values=cache)
        length = cache.get_seq_length()
        model(prompt(1), past_key_values=cache)
        assert (length, cache.get_seq_length()) == (40, 41)


def test_a_full_static_cache_says_so() -> None:
    model = two_layers("llama")
    with fierpatch.apply(model, budget=24, compile=True, dense_layers=1) as handle, torch.no_grad():
        cache = handle.new_cache(512)
        model(prompt(512), past_key_values=cache)
        with pytest.raises(CapacityError, match="512"):
            model(prompt(1), past_key_values=cache)
