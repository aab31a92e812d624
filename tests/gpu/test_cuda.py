"""On a CUDA device the same code gives the same index, the same tokens and one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import fierpatch
from fierpatch import ops
from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from fierpatch.select import select

pytestmark = pytest.mark.gpu

INDEXES = [
    FierIndex(64),
    FierIndex(128),
    RotatedIndex(64),
    RotatedIndex(128),
    RotatedIndex(128, bits=2),
    RotatedIndex(80),
    RotatedIndex(96, bits=2, group_size=32),
    RotatedIndex(256),
]


def llama(dtype: torch.dtype) -> Any:
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
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_the_index_is_the_same_on_both_devices(index: KeyIndex) -> None:
    """Bits, scales and centres built on CUDA equal those built on the CPU, bit for bit."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 3, 1300, index.head_dim, generator=generator)
    keys[0, 0, 5] = torch.nan
    query = torch.randn(2, 6, 64, index.head_dim, generator=generator)
    on_cpu = ops.build_index(index, keys)
    on_cuda = ops.build_index(index, keys.cuda())
    for left, right in zip(on_cpu, on_cuda, strict=True):
        assert torch.equal(left, right.cpu())
    scores = ops.index_scores(index, on_cpu, query, 1300)
    on_device = ops.index_scores(index, on_cuda, query.cuda(), 1300).cpu()
    torch.testing.assert_close(on_device, scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("budget", [1, 63, 64, 500, 2000])
def test_equal_scores_select_equal_tokens_on_both_devices(budget: int) -> None:
    """Ties go to the lowest index on CUDA as on the CPU."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 9, (2, 6, 1, 1111), generator=generator).float()
    options: dict[str, Any] = {"num_kv_heads": 6, "budget": budget, "per_query_head": True}
    on_cpu = select(scores, **options)
    assert torch.equal(select(scores.cuda(), **options).cpu(), on_cpu)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"index": "fier"},
        {"bits": 2},
        {"compile": True},
        {"refine": 2},
        {"refine": 2, "refine_bits": "exact", "compile": True},
    ],
    ids=str,
)
def test_full_budget_gives_the_tokens_of_the_unpatched_model(settings: dict[str, Any]) -> None:
    model = llama(torch.float32)
    ids = torch.randint(0, 256, (2, 700), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :99] = 0
    arguments: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "disable_compile": True,
    }
    stock = model.generate(ids, **arguments)
    with fierpatch.apply(model, budget=1024, **settings):
        assert torch.equal(model.generate(ids, **arguments), stock)


@pytest.mark.filterwarnings("default")  # the compiler advises TF32 and says when it skips a graph
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_generate_compiles_decode_into_one_graph(mode: str) -> None:
    """`cache_implementation="static"` compiles with fullgraph and gives stock's tokens."""
    model = llama(torch.float32)
    ids = torch.randint(0, 256, (1, 700), device="cuda")
    arguments: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    stock = model.generate(ids, **arguments)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with fierpatch.apply(model, budget=1024):
        compiled = model.generate(
            ids,
            cache_implementation="static",
            compile_config=CompileConfig(fullgraph=True, dynamic=False, mode=mode),
            **arguments,
        )
    assert torch.equal(compiled, stock)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_memory_is_released_after_generate() -> None:
    model = llama(torch.bfloat16)
    ids = torch.randint(0, 256, (1, 2000), device="cuda")
    arguments: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    with fierpatch.apply(model, budget=256):
        model.generate(ids, **arguments)
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            model.generate(ids, **arguments)
        assert torch.cuda.memory_allocated() == before
