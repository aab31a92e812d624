"""What does a whole decode step of a model cost, patched and not, and where does the time go?

On a CPU the peer is the same model unpatched (SDPA, DynamicCache) in the same process, steps of
both taken in turn; stages are timed on one layer of the patched model and multiplied by its number
of sparse layers. On a GPU, or with --only, the ways to decode are measured one after the other,
each with the memory freed before it: stock with a growing, a compiled static and an offloaded
cache, patched with a growing and a compiled static one, and the compiled ones through
`model.generate`. Caches are filled with random keys and values, so a long context costs no prefill.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fierpatch
from bench import ways
from bench.options import add_index, index_settings
from bench.rows import RESULTS, read, save, table
from bench.synthetic import SHAPES, fill, random_llama
from bench.timing import interleaved, summary
from fierpatch import reference
from fierpatch.cache import LayerCache
from fierpatch.evaluate import smollm2
from fierpatch.hf.checkpoints import load
from fierpatch.select import attention_weights, select_tokens


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench generate", description=__doc__)
    shapes = " or ".join(SHAPES)
    parser.add_argument("--model", help=f"id, path, or {shapes} for random weights; SmolLM2")
    parser.add_argument("--layers", type=int, help="fewer layers of random weights, for a dry run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, nargs="+", help="2K 4K 8000; on a GPU 64 32K 128K")
    parser.add_argument("--budget", type=int, help="512, on a GPU 1024")
    add_index(parser)
    parser.add_argument("--backend", default="auto", help="of the operators")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=ways.WAYS, help="these ways, in turn")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--output", type=Path, help="the file of rows")
    parser.add_argument("--keep", action="store_true", help="keep the file's other rows")
    options = parser.parse_args(arguments)
    is_cpu = options.device == "cpu"
    settings = {
        "budget": options.budget or (512 if is_cpu else 1024),
        **index_settings(options),
        "backend": options.backend,
    }
    contexts = options.context or ([2048, 4096, 8000] if is_cpu else [64, 32_768, 131_072])
    if options.model in SHAPES:
        model = random_llama(options.model, options.device, options.layers)
    else:
        dtype = torch.float32 if is_cpu else torch.bfloat16
        model, _ = load(options.model or smollm2.fetch(), dtype=dtype, device=options.device)
    path = options.output or RESULTS / f"generate-{options.device}.jsonl"
    earlier = read(path) if options.keep else []
    rows: list[dict[str, Any]] = []

    def keep(new: list[dict[str, Any]]) -> None:
        """Save after each measurement, so that a run cut short keeps what it has."""
        rows.extend(described(row, model, settings) for row in new)
        measured = {(row["what"], row["context"]) for row in rows}
        kept = [row for row in earlier if (row["what"], row["context"]) not in measured]
        save("generate", options.device, with_ratios(rows), path, kept=kept)

    if is_cpu and not options.only:
        with torch.inference_mode():
            for context in contexts:
                keep(in_turn(model, context, options.steps, settings))
    else:
        for context in contexts:
            plan = ways.Plan(context, options.steps, settings, options.compiler)
            for name in options.only or ways.WAYS:
                # As generate runs a model, which compiles otherwise under inference mode.
                with torch.no_grad():
                    row = ways.measure(model, name, plan)
                print({key: row[key] for key in row if not key.startswith("ms_")}, flush=True)
                keep([row | {"steps": options.steps, "compiler": options.compiler}])
    columns = ["what", "context", "ms", "ms_p20", "ms_p80", "ratio"]
    columns += ["peak_mib", "left_mib"] if any("peak_mib" in row for row in rows) else []
    print(table(with_ratios(rows), columns))
    print("saved", path)


def described(row: dict[str, Any], model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A row with its model and settings."""
    return {
        **row,
        "model": f"{model.config.model_type} {model.num_parameters() / 1e6:.0f}M",
        "dtype": str(model.dtype).removeprefix("torch."),
        **settings,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its time over that of the fastest stock way at the same context."""
    best: dict[int, float] = {}
    for row in rows:
        if row["what"].startswith("stock") and "," not in row["what"] and "ms" in row:
            best[row["context"]] = min(row["ms"], best.get(row["context"], row["ms"]))
    return [
        row | {"ratio": row["ms"] / best[row["context"]]}
        if "ms" in row and row["context"] in best
        else row
        for row in rows
    ]


def in_turn(model: Any, context: int, steps: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one context length: whole steps of both, then the stages of one layer."""
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    device = str(model.device)
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

    functions = {"stock": stock, "patched": patched, "stock, 64 tokens": short}
    times = interleaved(functions, device=device, count=steps)
    stores = [s for s in patched_cache.stores.values() if not s.is_dense]
    for name, stage in stages(model, stores[0]).items():
        samples = interleaved({name: stage}, device=device, count=steps)[name]
        times[f"  {name} x {len(stores)}"] = [sample * len(stores) for sample in samples]
    handle.remove()
    return [
        {"what": name, "context": context, **summary(samples, "ms")}
        for name, samples in times.items()
    ]


def stages(model: Any, store: LayerCache) -> dict[str, Callable[[], object]]:
    """The stages of one sparse layer as functions without arguments, by the reference."""
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
