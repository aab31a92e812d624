"""How much of a prefill does building the index take, in time and in memory?

A model with random weights reads a long prompt, unpatched and patched in turn, and keeps the logits
of the last token only. The difference is the index: K and V are stored by both.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fierpatch
from bench.options import add_index, index_settings
from bench.rows import save, table
from bench.synthetic import SHAPES, random_llama
from bench.timing import summary, synchronize


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench prefill_index", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a dry run")
    parser.add_argument("--context", type=int, nargs="+", default=[32_768])
    parser.add_argument("--rounds", type=int, default=3)
    add_index(parser)
    parser.add_argument("--backend", default="auto", help="of the operators")
    parser.add_argument("--offload", action="store_true", help="K and V go to the host")
    parser.add_argument("--output", type=Path, help="the file of rows")
    options = parser.parse_args(arguments)
    settings = {**index_settings(options), "backend": options.backend, "offload": options.offload}
    model = random_llama(options.model, options.device, options.layers)
    rows = []
    for context in options.context:
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, context), device=model.device)
        with torch.no_grad():
            rows += measure(model, ids, options.rounds, settings)
    print(table(rows, ["what", "context", "ms", "ms_p20", "ms_p80", "ratio", "peak_mib"]))
    print("saved", save("prefill_index", options.device, rows, options.output))


def measure(model: Any, ids: Tensor, rounds: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one prompt ``[1, S]``: both models, the first round of each left out."""
    times: dict[str, list[float]] = {"stock": [], "patched": []}
    peaks: dict[str, float] = {}
    with fierpatch.apply(model, **settings) as handle:
        for _ in range(rounds + 1):
            with handle.disabled():
                stock = prefill(model, DynamicCache(config=model.config), ids)
            patched = prefill(model, handle.new_cache(), ids)
            for name, (milliseconds, peak) in {"stock": stock, "patched": patched}.items():
                times[name].append(milliseconds)
                peaks[name] = peak
    rows = [
        {"what": name, **summary(samples[1:], "ms"), "peak_mib": peaks[name] / 2**20}
        for name, samples in times.items()
    ]
    for row in rows:
        row |= {
            "context": ids.shape[1],
            "ratio": row["ms"] / rows[0]["ms"],
            "peak_ratio": row["peak_mib"] / rows[0]["peak_mib"] if peaks["stock"] else None,
            "model": f"{model.config.model_type} {model.num_parameters() / 1e6:.0f}M",
            "dtype": str(model.dtype).removeprefix("torch."),
            "rounds": rounds,
            **settings,
        }
    return rows


def prefill(model: Any, cache: Any, ids: Tensor, chunk: int = 0) -> tuple[float, int]:
    """Milliseconds of one prefill, and the bytes at its peak beside the weights (0 on a CPU).

    In parts of `chunk` tokens, if there is a chunk.
    """
    is_cuda = model.device.type == "cuda"
    before = 0
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    synchronize(str(model.device))
    start = time.perf_counter()
    for part in ids.split(chunk or ids.shape[1], 1):
        model(part, past_key_values=cache, logits_to_keep=1)
    synchronize(str(model.device))
    milliseconds = (time.perf_counter() - start) * 1e3
    return milliseconds, torch.cuda.max_memory_allocated() - before if is_cuda else 0
