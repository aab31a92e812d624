"""The ways to decode that `bench.generate` measures one after the other on a device.

Each takes a model and a plan, makes its own cache, fills it and returns milliseconds a token.
Nothing of it may outlive the call: two caches of 128K tokens do not fit one device.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import fierpatch
from bench.rows import reason
from bench.synthetic import fill
from bench.timing import queued, summary, synchronize

# Calls before the first sample: compile, warm up, record; two more for what only settles then.
WARM_UP = 5
ROUNDS = 3  # pairs of calls of generate
FEWEST_NEW = 4  # tokens of the shorter call
OFFLOADED_STEPS = 3  # a second each at 128K


@dataclass(frozen=True)
class Plan:
    """What to measure: tokens in the cache, steps, the patch's settings, the compiler's backend."""

    context: int
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    compiler: str = "inductor"

    @property
    def capacity(self) -> int:
        """Of a static cache: room for all tokens that any of the ways decodes."""
        most_new = max(self.steps, ROUNDS * (2 * FEWEST_NEW + self.steps))
        return -(-(self.context + most_new + 2 * WARM_UP) // 512) * 512


def stock_dynamic(model: Any, plan: Plan) -> list[float]:
    cache = DynamicCache(config=model.config)
    return steps(model, model, cache, plan)


def stock_static(model: Any, plan: Plan) -> list[float]:
    cache = StaticCache(config=model.config, max_cache_len=plan.capacity)
    return steps(compiled(model, plan), model, cache, plan)


def stock_offloaded(model: Any, plan: Plan) -> list[float]:
    cache = DynamicCache(config=model.config, offloading=True)
    few = min(plan.steps, OFFLOADED_STEPS)
    return steps(model, model, cache, plan, count=few, warm_up=1)


def patched(model: Any, plan: Plan) -> list[float]:
    with fierpatch.apply(model, **plan.settings) as handle:
        return steps(model, model, handle.new_cache(), plan)


def patched_static(model: Any, plan: Plan) -> list[float]:
    with fierpatch.apply(model, **plan.settings, compile=True) as handle:
        cache = handle.new_cache(max_cache_len=plan.capacity)
        return steps(compiled(model, plan), model, cache, plan)


def stock_generate(model: Any, plan: Plan) -> list[float]:
    cache = StaticCache(config=model.config, max_cache_len=plan.capacity)
    return through_generate(model, cache, plan)


def patched_generate(model: Any, plan: Plan) -> list[float]:
    with fierpatch.apply(model, **plan.settings, compile=True) as handle:
        return through_generate(model, handle.new_cache(max_cache_len=plan.capacity), plan)


WAYS: dict[str, Callable[[Any, Plan], list[float]]] = {
    "stock-dynamic": stock_dynamic,
    "stock-static": stock_static,
    "stock-offloaded": stock_offloaded,
    "patched": patched,
    "patched-static": patched_static,
    "stock-generate": stock_generate,
    "patched-generate": patched_generate,
}


def measure(model: Any, name: str, plan: Plan) -> dict[str, Any]:
    """The row of one way: milliseconds a token and memory beside the weights, or a reason."""
    release(model)
    is_cuda = model.device.type == "cuda"
    weights = torch.cuda.memory_allocated() if is_cuda else 0
    row: dict[str, Any] = {"what": name, "context": plan.context}
    start = time.perf_counter()
    try:
        row |= summary(WAYS[name](model, plan), "ms")
    except Exception as error:
        # One way that is refused or runs out of memory must not cost the others.
        row["reason"] = reason(error)
    if is_cuda:
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - weights) / 2**20
        row["reserved_mib"] = (torch.cuda.memory_reserved() - weights) / 2**20
    release(model)
    if is_cuda:
        # More than the tens of MiB of cuBLAS's workspace: the next way starts with less memory.
        row["left_mib"] = (torch.cuda.memory_allocated() - weights) / 2**20
    row["seconds"] = time.perf_counter() - start
    return row


def release(model: Any) -> None:
    """Drop compiled code and recorded graphs, which hold the static caches they were made for."""
    model.__dict__.pop("_compiled_call", None)
    model.__dict__.pop("_last_compile_config", None)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    torch._dynamo.reset()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def compiled(model: Any, plan: Plan) -> Callable[..., object]:
    """The forward pass compiled whole, as `generate` compiles it."""
    function: Callable[..., object] = torch.compile(
        model.forward,
        fullgraph=True,
        backend=plan.compiler,
        mode="reduce-overhead" if plan.compiler == "inductor" else None,
    )
    return function


def steps(
    forward: Callable[..., object],
    model: Any,
    cache: Any,
    plan: Plan,
    *,
    count: int | None = None,
    warm_up: int = WARM_UP,
) -> list[float]:
    """Milliseconds of decode steps over a filled cache."""
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    device = str(model.device)
    fill(model, cache, plan.context)
    synchronize(device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        forward(token, past_key_values=cache)

    return queued(step, device=device, count=count or plan.steps, warm_up=warm_up)


def through_generate(model: Any, cache: Any, plan: Plan) -> list[float]:
    """Milliseconds a token of `model.generate` over a filled static cache.

    The difference of a longer call and a shorter one, so that what a call costs once is not in it.
    """
    device = str(model.device)
    fill(model, cache, plan.context)
    synchronize(device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call = seconds_of_generate
    call(model, cache, 2 * WARM_UP, plan)
    samples = []
    for _ in range(ROUNDS):
        short = call(model, cache, FEWEST_NEW, plan)
        long = call(model, cache, FEWEST_NEW + plan.steps, plan)
        samples.append((long - short) * 1e3 / plan.steps)
    if statistics.median(samples) <= 0:
        raise RuntimeError(f"more tokens took no longer: {samples} ms; measure more steps")
    return samples


def seconds_of_generate(model: Any, cache: Any, num_new: int, plan: Plan) -> float:
    """Seconds of one call that appends `num_new` tokens to what the cache holds."""
    # generate takes all ids, and feeds the model those that the cache does not hold: one.
    length = int(cache.get_seq_length()) + 1
    ids = torch.ones(1, length, dtype=torch.long, device=model.device)
    compile_config = None
    if model.device.type != "cuda":
        # A dry run: only on a GPU does generate compile by itself.
        compile_config = CompileConfig(backend=plan.compiler, mode=None)
        compile_config._compile_all_devices = True
    synchronize(str(model.device))
    start = time.perf_counter()
    output = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=num_new,
        do_sample=False,
        compile_config=compile_config,
    )
    synchronize(str(model.device))
    seconds = time.perf_counter() - start
    if output.shape[1] != length + num_new:
        raise RuntimeError(
            f"generate stopped after {output.shape[1] - length} of {num_new} tokens: the model has "
            "a token that ends a text; measure one with random weights"
        )
    return seconds
