"""FlexAttention on a CUDA device: its decode kernel attends as the reference does, in one graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig

import fierpatch
from fierpatch.errors import BackendError
from fierpatch.flex import Mode, QueryLayout, SelectionMask, selected_attention
from flex.attentions import Attention, assert_near, log_sum_exp
from flex.compiled import check_chunk, check_masks
from gpu.test_cuda import llama

# The compiler advises TF32, and says when it skips a graph.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LLAMA = Attention(1, 8, 4, 1, 4096, 128, 128, width=1024, dtype=BF16, device="cuda")
# Groups that are no power of two, lengths off every block, several queries, lists a query head.
ATTENTIONS = {
    "llama": LLAMA,
    "one head": Attention(2, 2, 1, 1, 1040, 64, 64, dtype=F16, device="cuda"),
    "odd": Attention(2, 2, 7, 3, 649, 80, 24, softcap=4.0, dtype=BF16, device="cuda"),
    "eight queries": Attention(1, 2, 8, 8, 1500, 64, 64, dtype=BF16, device="cuda"),
    "sinks": Attention(2, 2, 8, 1, 700, 64, 64, has_sinks=True, dtype=BF16, device="cuda"),
    "float32": Attention(1, 3, 5, 2, 333, 256, 256, has_sinks=True, device="cuda"),
    "query heads": Attention(2, 2, 3, 4, 515, 128, 128, per_query_head=True, softcap=9.0,
                             has_sinks=True, dtype=F16, device="cuda"),
}  # fmt: skip
MODES: tuple[Mode, ...] = ("mask", "compact")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_mode
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_the_reference_s(name: str, mode: Mode) -> None:
    """By the kernel for decode, which is named and so used or an error; its log-sum-exp too."""
    case = ATTENTIONS[name]
    options = case.options()
    for seed in range(4):
        tensors = case.tensors(seed, is_dark=seed == 3)
        output, lse = selected_attention(
            *tensors, **options, mode=mode, is_ascending=True, with_lse=True
        )
        assert_near(output, tensors, options)
        query, keys, _, lists = tensors
        exact = log_sum_exp(query, keys, lists, **options)
        assert lse is not None
        torch.testing.assert_close(lse.double(), exact, rtol=1e-3, atol=1e-3)


@every_mode
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_blocks_may_be_larger(block_size: int, mode: Mode) -> None:
    case = ATTENTIONS["odd"]
    tensors, options = case.tensors(0), case.options()
    output, _ = selected_attention(*tensors, **options, mode=mode, block_size=block_size)
    assert_near(output, tensors, options)


@every_mode
def test_a_selection_of_every_token_is_dense_attention(mode: Mode) -> None:
    case = Attention(1, 8, 4, 1, 2048, 128, 128, width=2048, dtype=BF16, device="cuda")
    query, keys, values, _ = case.tensors(0)
    lists = torch.arange(2048, device="cuda").expand(1, 8, 1, -1).contiguous()
    output, _ = selected_attention(
        query, keys, values, lists, scale=0.3, mode=mode, is_ascending=True
    )
    assert_near(output, (query, keys, values, lists), case.options())


@every_mode
def test_the_kernel_is_the_one_for_decode(mode: Mode) -> None:
    def attend(*tensors: Tensor) -> Tensor:
        return selected_attention(*tensors, scale=0.1, mode=mode, is_ascending=True)[0]

    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(compiled, *LLAMA.tensors(0))
    # A constant that no other of its kernels has; their names are those of what is fused.
    assert "SPLIT_KV" in "".join(code)


@every_mode
def test_64_selections_compile_once_and_replay_in_a_captured_graph(mode: Mode) -> None:
    def attend(*tensors: Tensor) -> Tensor:
        return selected_attention(*tensors, scale=0.3, mode=mode, is_ascending=True)[0]

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=counter)
    *rest, lists = LLAMA.tensors(0)
    for _ in range(3):
        compiled(*rest, lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compiled(*rest, lists)
    for seed in range(64):
        lists.copy_(LLAMA.tensors(seed)[3])
        graph.replay()
        if seed % 16 == 0:
            assert_near(output, (*rest, lists), LLAMA.options())
            assert_near(compiled(*rest, lists), (*rest, lists), LLAMA.options())
    assert counter.frame_count == 1


def test_a_mask_is_the_same_on_both_devices_and_updates_in_a_captured_graph() -> None:
    layout = QueryLayout(32, 1, 4)
    sizes: dict[str, Any] = {"batch_size": 1, "num_lists": 8, "length": 4096}
    on_cpu = SelectionMask.empty(layout, **sizes)
    on_cuda = SelectionMask.empty(layout, **sizes, device="cuda")
    lists = LLAMA.tensors(0)[3]
    on_cuda.update(lists, is_ascending=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_cuda.update(lists, is_ascending=True)
    for seed in range(8):
        lists.copy_(LLAMA.tensors(seed)[3])
        graph.replay()
        on_cpu.update(lists.cpu(), is_ascending=True)
        assert torch.equal(on_cuda.words.cpu(), on_cpu.words)
        assert torch.equal(on_cuda.num_blocks.cpu(), on_cpu.num_blocks)
        for head, count in enumerate(on_cpu.num_blocks.flatten().tolist()):
            one, other = (mask.block_indices[0, head, 0, :count] for mask in (on_cuda, on_cpu))
            assert torch.equal(one.cpu(), other)


def test_compiled_masks_allow_the_cells_of_their_dense_masks() -> None:
    check_masks("cuda")


def test_a_compiled_chunk_of_a_prefill_visits_its_blocks_alone() -> None:
    check_chunk("cuda", num_queries=300, block_size=(128, 128))


def test_more_queries_than_the_kernel_takes_are_gathered_or_refused() -> None:
    case = Attention(1, 2, 20, 8, 40_000, 64, 64, width=16, dtype=BF16, device="cuda")
    tensors, options = case.tensors(0), case.options()
    output, _ = selected_attention(*tensors, **options)
    assert_near(output, tensors, options)
    with pytest.raises(BackendError, match=r"160 .*takes 127.*mode=\"compact\""):
        selected_attention(*tensors, **options, mode="mask")


@every_mode
@pytest.mark.parametrize("compile_mode", [None, "default", "reduce-overhead"])
def test_generate_gives_the_tokens_of_the_kernels(
    compile_mode: str | None, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with budget for all those of the unpatched model; compiled, decode is one graph."""
    monkeypatch.setattr("fierpatch.flex.operators.MODE", mode)
    model = llama(torch.float32)
    ids = torch.randint(0, 256, (2, 700), device="cuda")
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :99] = 0
    arguments: dict[str, Any] = {
        "attention_mask": attention_mask,
        "max_new_tokens": 64,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    stock = model.generate(ids, **arguments, disable_compile=True)
    options: dict[str, Any] = {"disable_compile": True}
    if compile_mode is not None:
        config = CompileConfig(fullgraph=True, dynamic=False, mode=compile_mode)
        options = {"cache_implementation": "static", "compile_config": config}
    outputs = {}
    for backend, budget in (("triton", 96), ("flex", 96), ("flex", 1024)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with fierpatch.apply(model, budget=budget, backend=backend):
            outputs[backend, budget] = model.generate(ids, **arguments, **options)
        if compile_mode is not None:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(outputs["flex", 96], outputs["triton", 96])
    assert torch.equal(outputs["flex", 1024], stock)
