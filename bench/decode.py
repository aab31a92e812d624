"""What does one decode step cost, patched and not, and where does the time go?

The peer is the same model unpatched (SDPA, DynamicCache) in the same process, steps of both taken
in turn. Caches are filled with random keys and values, so a long context costs no prefill. Stages
are timed on one layer of the patched model and multiplied by its number of sparse layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fierpatch
from bench.rows import save, table
from fierpatch import reference
from fierpatch.cache import LayerCache
from fierpatch.evaluate import smollm2
from fierpatch.hf.checkpoints import load
from fierpatch.select import attention_weights, select_tokens


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench decode", description=__doc__)
    parser.add_argument("--model", help="id, path, or llama-8b for its shape; SmolLM2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 4096, 8000])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--index", default="rotated")
    parser.add_argument("--bits", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    if options.model == "llama-8b":
        model = random_llama_8b(options.device)
    else:
        model, _ = load(options.model or smollm2.fetch(), dtype=dtype, device=options.device)
    rows = []
    with torch.inference_mode():
        for context in options.context:
            settings = {"budget": options.budget, "index": options.index, "bits": options.bits}
            rows += measure(model, context, options.steps, settings)
    columns = ["what", "context", "ms", "ms_p20", "ms_p80", "ratio"]
    print(table(rows, columns))
    print("saved", save("decode", options.device, rows))


def random_llama_8b(device: str) -> Any:
    """A model of the shape of Llama 3.1 8B with random weights, in bfloat16."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 20,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def measure(model: Any, context: int, steps: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one context length: whole steps of both, then the stages of one layer."""
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    handle = fierpatch.apply(model, **settings)
    patched_cache = handle.new_cache()
    fill(model, patched_cache, context)
    stock_cache = DynamicCache(config=model.config)
    fill(model, stock_cache, context)
    short_cache = DynamicCache(config=model.config)
    fill(model, short_cache, 64)

    def patched() -> None:
        model(token, past_key_values=patched_cache)

    def stock() -> None:
        with handle.disabled():
            model(token, past_key_values=stock_cache)

    def short() -> None:
        with handle.disabled():
            model(token, past_key_values=short_cache)

    times = interleaved({"stock": stock, "patched": patched, "stock, 64 tokens": short}, steps)
    stores = [s for s in patched_cache.stores.values() if not s.is_dense]
    for name, stage in stages(model, stores[0]).items():
        samples = interleaved({name: stage}, steps)[name]
        times[f"  {name} x {len(stores)}"] = [sample * len(stores) for sample in samples]
    handle.remove()
    base = statistics.median(times["stock"])
    return [
        {
            "what": name,
            "context": context,
            "ms": statistics.median(samples),
            "ms_p20": sorted(samples)[len(samples) // 5],
            "ms_p80": sorted(samples)[len(samples) * 4 // 5],
            "ratio": statistics.median(samples) / base,
            "model": f"{model.config.model_type} {model.num_parameters() / 1e6:.0f}M",
            "dtype": str(model.dtype).removeprefix("torch."),
            **settings,
        }
        for name, samples in times.items()
    ]


def fill(model: Any, cache: Any, length: int) -> None:
    """Random keys and values in every layer, and the index of our layers calibrated and built."""
    config, generator = model.config, torch.Generator(model.device).manual_seed(0)
    head_dim = config.hidden_size // config.num_attention_heads
    for number in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, head_dim)
        key, value = (
            torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device)
            for _ in range(2)
        )
        cache.update(key, value, number)
        store = getattr(cache.layers[number], "store", None)
        if store is not None and not store.is_dense:
            store.index_prompt(key.repeat_interleave(config.num_attention_heads // shape[1], 1))


def stages(model: Any, store: LayerCache) -> dict[str, Callable[[], object]]:
    """The stages of one sparse layer as functions without arguments."""
    assert store.index is not None
    keys, values, index = store.keys, store.values, store.index
    length, head_dim, settings = store.num_tokens, keys.shape[3], store.config
    num_heads, scale = model.config.num_attention_heads, head_dim**-0.5
    query = torch.randn(1, num_heads, 1, head_dim, dtype=keys.dtype, device=keys.device)
    scores = reference.index_scores(index, store.state, query, length)
    weights = attention_weights(scores, num_kv_heads=keys.shape[1], scale=scale)
    limits = {"budget": settings.budget, "sinks": settings.sinks, "recent": settings.recent}
    chosen = select_tokens(weights, **limits)

    def softmax_mean() -> Tensor:
        return attention_weights(scores, num_kv_heads=keys.shape[1], scale=scale)

    return {
        "append": lambda: index.append(store.state, keys, length - 1, length),
        "scores": lambda: reference.index_scores(index, store.state, query, length),
        "softmax mean": softmax_mean,
        "select": lambda: select_tokens(weights, **limits),
        "attend": lambda: reference.gather_attention(query, keys, values, chosen, scale=scale),
    }


def interleaved(functions: dict[str, Callable[[], object]], steps: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the functions taken in turn after three warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for step in range(steps + 3):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if step >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
