"""Runs over static caches, compiled or not, take the memory and the graphs of one run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import fierpatch

pytestmark = [
    pytest.mark.gpu,
    # The compiler advises TF32 and says when it skips a graph.
    pytest.mark.filterwarnings("default"),
]

NUM_RUNS = 10
CAPACITIES = pytest.mark.parametrize(
    "lengths", [(700,), (700, 1500)], ids=["one capacity", "growing"]
)
# Every mode compiles anew in every test, for up to half a minute.
MODES = pytest.mark.parametrize("mode", [None, "reduce-overhead"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).to("cuda").eval()


def generate(model: Any, length: int, mode: str | None, **options: Any) -> Any:
    """Greedy tokens after a prompt of that length; None is an uncompiled run."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 256, (1, length), generator=generator).cuda()
    compilation: dict[str, Any] = {"disable_compile": True}
    if mode is not None:
        config = CompileConfig(fullgraph=True, dynamic=None, mode=mode)
        compilation = {"compile_config": config}
    return model.generate(
        ids,
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        cache_implementation="static",
        **compilation,
        **options,
    )


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def graphs() -> tuple[int, int]:
    """How much has been compiled, and how much recorded: every recording adds its own inputs."""
    recorded = counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    return counters["stats"]["unique_graphs"], recorded


def pooled_keys(handle: fierpatch.Handle) -> list[Tensor]:
    return [layer.keys for layer in handle._pool._layers if layer.keys is not None]


@MODES
@CAPACITIES
def test_memory_and_graphs_are_flat_over_runs(mode: str | None, lengths: tuple[int, ...]) -> None:
    model = llama()
    with fierpatch.apply(model, budget=256) as handle:
        # The first round compiles; where it grows, a second one settles on the longer capacity.
        tokens = {length: generate(model, length, mode) for length in lengths}
        for length in lengths:
            generate(model, length, mode)
        keys = pooled_keys(handle)
        addresses, before, used = [each.data_ptr() for each in keys], graphs(), allocated()
        for number in range(NUM_RUNS):
            length = lengths[number % len(lengths)]
            assert torch.equal(generate(model, length, mode), tokens[length])
            assert [each.data_ptr() for each in pooled_keys(handle)] == addresses
            # Less than the smallest thing that a cache left behind would hold on to.
            assert abs(allocated() - used) < keys[0].nbytes
        assert graphs() == before


@MODES
def test_a_second_run_of_one_capacity_compiles_and_records_nothing(mode: str | None) -> None:
    model = llama()
    with fierpatch.apply(model, budget=256):
        first = generate(model, 700, mode)
        before = graphs()
        assert torch.equal(generate(model, 700, mode), first)
        assert graphs() == before


@MODES
def test_a_longer_run_releases_the_shorter_layers(mode: str | None) -> None:
    """Also from a graph that was captured with them."""
    model = llama()
    with fierpatch.apply(model, budget=256) as handle:
        generate(model, 700, mode)
        shorter = pooled_keys(handle)
        generate(model, 1500, mode)
        assert all(each.numel() == 0 for each in shorter)
        assert all(each.shape[2] == 1536 for each in pooled_keys(handle))


@MODES
def test_keys_and_values_go_with_the_patch(mode: str | None) -> None:
    model = llama()
    handle = fierpatch.apply(model, budget=256)
    tokens = generate(model, 3000, mode)
    keys = pooled_keys(handle)
    used, num_bytes = allocated(), sum(2 * each.nbytes for each in keys)
    handle.remove()
    assert used - allocated() >= num_bytes
    with fierpatch.apply(model, budget=256):
        assert torch.equal(generate(model, 3000, mode), tokens)


@MODES
def test_a_cache_that_was_kept_is_not_written_to(mode: str | None) -> None:
    """Nor by a graph that was captured over it."""
    model = llama()
    with fierpatch.apply(model, budget=256):
        tokens = generate(model, 700, mode)
        kept = generate(model, 700, mode, return_dict_in_generate=True).past_key_values
        before = [layer.keys.clone() for layer in kept.layers]
        for _ in range(3):
            assert torch.equal(generate(model, 700, mode), tokens)
        for layer, keys in zip(kept.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
