"""On a GPU, keys and values on the host give what they give on the device, and are given back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

import fierpatch
from fierpatch.offload import DeviceStore, HostStore, MemoryPool, Transfer
from fierpatch.offload.memory import HostMemory
from kernels.feeds import Feed, check_append
from kernels.projections import Layer, check_projection
from kernels.residencies import Steps, check_residency

pytestmark = [
    pytest.mark.gpu,
    # The compiler advises TF32 and says when it skips a graph.
    pytest.mark.filterwarnings("default"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
    )
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def prompt(length: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 256, (rows, length), generator=generator).cuda()


def padded(length: int) -> dict[str, torch.Tensor]:
    ids = prompt(length, 2)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"inputs": ids, "attention_mask": mask}


def generate(model: Any, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": 40, **options}
    if "inputs" not in options:
        options["inputs"] = prompt(700)
    return model.generate(
        pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip


EAGER: dict[str, Any] = {"disable_compile": True}
STATIC: dict[str, Any] = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead"),
}
MODES: dict[str, dict[str, Any]] = {
    "eager": EAGER,
    "padded": EAGER | {"padded": 700},
    "outgrows its room": EAGER | {"length": 500, "max_new_tokens": 200},
    "beams": EAGER | {"num_beams": 3},
    "prompt lookup": EAGER | {"prompt_lookup_num_tokens": 5},
    "chunks": EAGER | {"prefill_chunk_size": 256, "padded": 700},
    # Of 512 bytes a token, over the ends of pieces of 2 MiB.
    "long chunks": EAGER | {"prefill_chunk_size": 3000, "length": 10_000},
    "static": EAGER | {"cache_implementation": "static"},
    "compiled": STATIC,
    "compiled, padded": STATIC | {"padded": 700},
    "compiled chunks": STATIC | {"prefill_chunk_size": 350},
}


def options_of(mode: str) -> dict[str, Any]:
    options = dict(MODES[mode])
    if "padded" in options:
        options |= padded(options.pop("padded"))
    if "length" in options:
        options["inputs"] = prompt(options.pop("length"))
    return options


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "how", [{}, {"per_query_head": True, "refine": 2}, {"prefetch": True}], ids=str
)
def test_the_host_gives_the_logits_of_the_device(mode: str, how: dict[str, Any]) -> None:
    model = llama()
    outputs = []
    for is_offloaded in (False, True):
        torch._dynamo.reset()
        counters.clear()
        settings = {"budget": 64, **how, "offload": is_offloaded}
        if not is_offloaded:
            settings.pop("prefetch", None)
        with fierpatch.apply(model, **settings) as handle:
            outputs.append(generate(model, **options_of(mode)))
            layers = handle.report().layers[2:]
        assert all(layer.backend == "triton" for layer in layers)
        assert all((layer.host_bytes > 0) == is_offloaded for layer in layers)
        if mode == "compiled":
            assert counters["stats"]["unique_graphs"] == 1
            assert not counters["inductor"]["cudagraph_skips"]
    resident, offloaded = outputs
    assert torch.equal(offloaded.sequences, resident.sequences)
    for left, right in zip(offloaded.logits, resident.logits, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("has_prefetch", [False, True])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_turns_over_one_cache_give_the_logits_of_the_device(mode: str, has_prefetch: bool) -> None:
    """A prompt, steps, a second prompt behind them, steps, a crop and steps."""
    model = llama()
    found = []
    is_static = mode == "compiled"
    for is_offloaded in (False, True):
        torch._dynamo.reset()
        settings = {"budget": 64, "offload": is_offloaded, "compile": is_static}
        settings["prefetch"] = is_offloaded and has_prefetch
        with fierpatch.apply(model, **settings) as handle:
            cache = handle.new_cache(max_cache_len=4096 if is_static else 0)
            options = STATIC | {"cache_implementation": None} if is_static else EAGER
            first = generate(model, past_key_values=cache, **options)
            longer = torch.cat((first.sequences, prompt(300)), dim=1)
            second = generate(model, past_key_values=cache, inputs=longer, **options)
            cache.crop(-30)
            shorter = second.sequences[:, :-30]
            third = generate(model, past_key_values=cache, inputs=shorter, **options)
        found.append([*first.logits, *second.logits, *third.logits])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


def resident_nbytes() -> int:
    """Memory of this process that is not swapped out, pinned memory included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.mark.parametrize("has_prefetch", [False, True])
@pytest.mark.parametrize("options", [EAGER, STATIC], ids=["eager", "compiled"])
def test_ten_runs_take_the_memory_of_one(options: dict[str, Any], has_prefetch: bool) -> None:
    model = llama()
    with fierpatch.apply(model, budget=64, offload=True, prefetch=has_prefetch):
        for number in range(11):
            generate(model, inputs=prompt(6000), **(options | {"max_new_tokens": 4}))
            gc.collect()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated(), resident_nbytes()
            if number == 1:
                first = held
    assert held[0] <= first[0]
    # Of the host 3 layers of 6,144 tokens, 2 heads and 64 + 64 channels of 2 bytes: 9 MiB a run.
    assert held[1] <= first[1] + (6 << 20)


@pytest.mark.parametrize("options", [EAGER, STATIC], ids=["eager", "compiled"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_run_that_is_broken_off_leaves_model_and_memory(
    options: dict[str, Any], error: type[BaseException]
) -> None:
    model = llama()
    with fierpatch.apply(model, budget=64, offload=True) as handle:
        expected = generate(model, **options).sequences
        generate(model, **EAGER, inputs=prompt(3000))  # what that allocates for good, it does now
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()

        def fail(*args: Any) -> None:
            raise error("in the middle of a run")

        hook = model.model.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(error):
            generate(model, **EAGER, inputs=prompt(3000))
        hook.remove()
        gc.collect()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + (1 << 20)
        assert torch.equal(generate(model, **options).sequences, expected)
        assert handle.is_attached


ERRORS = pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])


def check_breaks(handle: fierpatch.Handle, options: dict[str, Any], break_off: Any) -> None:
    """After runs that `break_off` ends, others give the tokens and take the memory of before."""
    options = options | {"inputs": prompt(3000)}

    def run() -> torch.Tensor:
        sequences: torch.Tensor = generate(handle.model, **options).sequences
        return sequences

    def on_device() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def on_host() -> set[tuple[int, int]]:
        memories = [each for each in gc.get_objects() if type(each) is HostMemory]
        return {(id(one), one.nbytes) for one in memories}

    expected = run()
    assert torch.equal(run(), expected)  # what is allocated for good, or recorded, now is
    before, memories, graphs = on_device(), on_host(), counters["stats"]["unique_graphs"]
    # What a run leaves behind adds up: of 3,072 tokens its dense layers alone have 3 MiB.
    for _ in range(3):
        break_off(options)
        assert handle.is_attached
        assert on_device() <= before + (1 << 20)
        assert torch.equal(run(), expected)
        assert on_device() <= before + (1 << 20)
        assert on_host() == memories  # and not more, as if the run that broke still had its own
    assert counters["stats"]["unique_graphs"] == graphs


@ERRORS
@pytest.mark.parametrize("is_fetching", [False, True], ids=["placed", "fetching"])
def test_a_step_that_is_broken_off_while_it_fetches_ahead_leaves_model_and_memory(
    is_fetching: bool, error: type[BaseException]
) -> None:
    """Behind the attention of layer 2, before what layer 3 will need is fetched, or meanwhile."""
    model = llama()
    with fierpatch.apply(model, budget=64, offload=True, prefetch=True) as handle:

        def break_off(options: dict[str, Any]) -> None:
            passes = count(1)

            def fail(module: Any, inputs: Any, arguments: dict[str, Any], *output: Any) -> None:
                if next(passes) == 3:  # the prompt, a step that finds no row there, another
                    started = arguments["past_key_values"].stores[3]._started
                    assert started is not None
                    assert started.is_fetching == is_fetching
                    raise error("in the middle of a step")

            before, after = model.model.layers[3], model.model.layers[2].self_attn
            if is_fetching:
                hook = before.register_forward_pre_hook(fail, with_kwargs=True)
            else:
                hook = after.register_forward_hook(fail, with_kwargs=True)
            with pytest.raises(error, match="in the middle of a step"):
                generate(model, **options)
            hook.remove()

        check_breaks(handle, EAGER, break_off)


@ERRORS
def test_a_compiled_run_that_is_broken_off_between_steps_leaves_model_and_memory(
    error: type[BaseException],
) -> None:
    model = llama()
    with fierpatch.apply(model, budget=64, offload=True, prefetch=True) as handle:

        def break_off(options: dict[str, Any]) -> None:
            passes = count(1)

            def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                if next(passes) == 4:  # the prompt and three steps
                    raise error("between two steps")
                return scores

            with pytest.raises(error, match="between two steps"):
                generate(model, logits_processor=LogitsProcessorList([fail]), **options)

        options = STATIC | {"cache_implementation": "offloaded_static"}
        check_breaks(handle, options, break_off)
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["inductor"]["cudagraph_skips"]


def test_pinned_memory_is_the_same_on_both_sides() -> None:
    memory = HostMemory(1 << 30, CUDA)
    memory.grow(3 << 20)
    on_device, on_host = (
        make((1000, 7), torch.bfloat16) for make in (memory.on_device, memory.host)
    )
    on_device.copy_(torch.arange(7000).view(1000, 7))
    torch.cuda.synchronize()
    assert torch.equal(on_host, on_device.cpu())
    memory.grow(100 << 20)
    larger = memory.on_device((50 << 20,), torch.bfloat16)
    assert larger.data_ptr() == on_device.data_ptr()
    larger[-1] = 5
    torch.cuda.synchronize()
    assert memory.host((50 << 20,), torch.bfloat16)[-1] == 5
    del memory
    assert larger[-1] == 5, "the memory lives as long as a tensor of it"


def test_a_store_in_pieces_holds_the_rows_of_one_on_the_device() -> None:
    """A token is 1,280 bytes here, and pieces end in the middle of tokens 3,276 and 4,915."""
    generator = torch.Generator(CUDA).manual_seed(0)
    key, value = (
        torch.randn(2, 5, 7000, width, device=CUDA, generator=generator).bfloat16()
        for width in (40, 24)
    )
    lengths = (3000, 4500, 7000)  # in 4, 6 and 10 MiB
    resident = DeviceStore(key, value, lengths[0])
    offloaded = HostStore(key, value, lengths[0], 16_384, Transfer(), MemoryPool())
    both = resident, offloaded

    def check() -> None:
        assert torch.equal(offloaded.keys, resident.keys)
        assert torch.equal(offloaded.values, resident.values)

    for start, stop in pairwise((0, *lengths)):
        new = key[:, :, start:stop], value[:, :, start:stop]
        if stop == lengths[-1]:
            offloaded.read_ahead(start, stop - start)
        if start:
            for store in both:
                store.grow(stop)
        read = [store.read(*new, start) for store in both]
        for store in both:
            store.write(*new, start)
            store.join()
        for left, right in zip(*read, strict=True):
            assert torch.equal(left, right)
        check()
    assert len([*offloaded._memory.parts(0, offloaded.host_nbytes)]) == 3

    for order in ([1, 0], [1, 1, 0]):  # in place, and to other memory
        keys, values = offloaded.read_all(torch.tensor(6000, device=CUDA))
        assert torch.equal(keys[:, :, :6000], resident.keys[:, :, :6000])
        assert torch.equal(values[:, :, :6000], resident.values[:, :, :6000])
        assert not keys[:, :, 6000:].any()
        for store in both:
            store.take(torch.tensor(order, device=CUDA), 7000)
        check()
    for store in both:
        store.grow(9000)
        store.clear()
    check()


def test_a_prompt_on_its_way_to_the_host_is_on_the_device_for_two_layers() -> None:
    """Beside the keys and values at work, however many layers there are; and all arrive."""
    shape, num_layers = (1, 8, 4096, 128), 8  # 16 MiB a layer

    def new(number: int) -> torch.Tensor:
        return torch.full(shape, number, device=CUDA, dtype=torch.bfloat16)

    transfer, pool, like = Transfer(), MemoryPool(), new(0)
    stores = [HostStore(like, like, 4096, 4096, transfer, pool) for _ in range(num_layers)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for number, store in enumerate(stores):
        key, value = new(number), new(-number)
        store.write(key, value, 0)
        del key, value
    taken = torch.cuda.max_memory_allocated() - before
    nbytes = stores[0].host_nbytes
    # A layer as it came, its rows in pairs, and the pairs of the one before; the allocator may
    # leave up to 1 MiB behind each of four tensors.
    assert 2 * nbytes < taken <= 3 * nbytes + (4 << 20)
    stores[0].join()
    assert torch.cuda.memory_allocated() == before
    for number, store in enumerate(stores):
        assert (store.keys == number).all()
        assert (store.values == -number).all()


@pytest.mark.parametrize(
    "case",
    [
        Steps(128, 64, 500, 2, 2, 1, 128, 128, dtype=torch.bfloat16),
        Steps(200, 100, 4000, 1, 8, 1, 128, 128, num_steps=80, drift=20, dtype=torch.bfloat16),
        Steps(2048, 1024, 40_000, 1, 8, 1, 128, 128, num_steps=30, drift=200, dtype=torch.float16),
        Steps(300, 100, 900, 1, 2, 4, 64, 48, num_steps=70, drift=20, candidates=150),
        Steps(256, 64, 900, 1, 8, 1, 128, 96, num_steps=70, candidates=90, crops=(None, 150)),
        Steps(256, 64, 900, 2, 2, 1, 64, 64, num_steps=9, crops=(70, None, 0), more_room=512),
        Steps(1024, 1024, 3000, 1, 1, 1, 80, 80, fill=1.0, drift=900, candidates=700),
    ],
    ids=str,
)
def test_a_hot_set_by_kernels_is_that_of_the_tensors(case: Steps) -> None:
    check_residency(case, CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_a_projection_is_a_linear_layer(rows: int, dtype: torch.dtype) -> None:
    check_projection(Layer(rows, 4096, 4096, rows > 1, "strided", dtype), CUDA)
    check_projection(Layer(rows, 1000, 777, rows == 1, "offset", dtype), CUDA)


@pytest.mark.parametrize("group_size", [32, 128])
def test_paired_rows_are_stored_and_indexed_as_others(group_size: int) -> None:
    from fierpatch.index import RotatedIndex

    index = RotatedIndex(128, group_size=group_size)
    feed = Feed(index, 500, 500, (1,) * 30, batch_size=2, num_kv_heads=2, dtype=torch.bfloat16)
    check_append(feed, CUDA, is_paired=True)
