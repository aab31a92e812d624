"""How long does a prefill take, and how much memory at its peak, densely and sparsely?

A model with random weights reads a long prompt and keeps the logits of the last token only, one way
after the other: unpatched; patched, dense and sparse; both with K and V on the host. At once, or in
parts, each of which attends to all parts before it (`--chunk`). Of each the time, the bytes at the
peak (with the weights and beside them), and for sparse ones the density. Random weights spread
attention evenly, so that sparse ones need most blocks: `flex_prefill` plants what a model has.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fierpatch
from bench import prefill_index
from bench.options import add_index, index_settings
from bench.rows import reason, save, table
from bench.synthetic import SHAPES, random_llama
from bench.timing import summary
from fierpatch import FierConfig
from fierpatch.config import PREFILL_SCORES
from fierpatch.flex.blocks import candidate_blocks
from fierpatch.patching import current_handle

WAYS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "dense": {},
    "sparse": {"prefill": "sparse"},
    "dense, offload": {"offload": True},
    "sparse, offload": {"prefill": "sparse", "offload": True},
}
COLUMNS = ["what", "context", "chunk", "mlp_chunk", "ms", "ms_p20", "ms_p80", "ratio"]
COLUMNS += ["peak_gib", "beside_gib", "density"]


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench prefill", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a dry run")
    parser.add_argument("--context", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="these ways")
    parser.add_argument("--mass", type=float, default=FierConfig.prefill_mass)
    parser.add_argument("--scores", choices=PREFILL_SCORES, default=FierConfig.prefill_scores)
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a part; 0 for one part")
    parser.add_argument("--mlp-chunk", type=int, default=0, help="tokens, of patched ways")
    parser.add_argument("--rounds", type=int, default=3)
    add_index(parser)
    parser.add_argument("--backend", default="auto", help="of the operators")
    parser.add_argument("--output", type=Path, help="the file of rows")
    options = parser.parse_args(arguments)
    settings = FierConfig(
        prefill_mass=options.mass,
        prefill_scores=options.scores,
        mlp_chunk=options.mlp_chunk,
        backend=options.backend,
        **index_settings(options),
    )
    model = random_llama(options.model, options.device, options.layers)
    rows = []
    for context in options.context:
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, context), device=model.device)
        with torch.no_grad():
            rows += measure(model, ids, options.rounds, settings, options.only, options.chunk)
        print(table(rows[-len(options.only) :], COLUMNS), flush=True)
    print("saved", save("prefill", options.device, rows, options.output))


def measure(
    model: Any, ids: Tensor, rounds: int, settings: FierConfig, ways: list[str], chunk: int = 0
) -> list[dict[str, Any]]:
    """Rows of one prompt ``[1, S]``, a row a way; the first round of each is left out.

    All rounds of a way under one handle, with which pinned memory of the host stays.
    """
    samples: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, dict[str, Any]] = {name: {"what": name} for name in ways}
    for name in ways:
        way = WAYS[name]
        try:
            with nullcontext() if way is None else fierpatch.apply(model, settings.replace(**way)):
                for number in range(rounds + 1):
                    milliseconds, found = prefill(model, ids, chunk)
                    if number:
                        samples[name].append(milliseconds)
                        rows[name] |= found
        except (torch.OutOfMemoryError, fierpatch.FierError) as error:
            rows[name]["reason"] = reason(error)
    for name, row in rows.items():
        if samples[name]:
            row |= summary(samples[name], "ms")
            base = rows[ways[0]].get("ms")
            row["ratio"] = row["ms"] / base if base else None
        row |= {
            "context": ids.shape[1],
            "model": f"{model.config.model_type} {model.num_parameters() / 1e6:.0f}M",
            "dtype": str(model.dtype).removeprefix("torch."),
            "rounds": rounds,
            "chunk": chunk,
            "mlp_chunk": 0 if WAYS[name] is None else settings.mlp_chunk,
            "prefill_mass": settings.prefill_mass,
            "prefill_scores": settings.prefill_scores,
        }
    return list(rows.values())


def prefill(model: Any, ids: Tensor, chunk: int) -> tuple[float, dict[str, Any]]:
    """Milliseconds of one prefill, and columns of its row (no memory on a CPU)."""
    handle = current_handle(model)
    if handle is None:
        return timed(model, DynamicCache(config=model.config), ids, chunk)
    cache = handle.new_cache()
    counts: list[Tensor] = []

    def count(span: Any, chosen: Tensor) -> None:
        counts.append(torch.stack([chosen.sum(), chosen.shape[1] * candidate_blocks(span).sum()]))

    for store in cache.stores.values():
        store.block_observer = count
    milliseconds, columns = timed(model, cache, ids, chunk)
    if counts:
        chosen, causal = torch.stack(counts).sum(0).tolist()
        columns["density"] = chosen / causal
    return milliseconds, columns


def timed(model: Any, cache: Any, ids: Tensor, chunk: int) -> tuple[float, dict[str, Any]]:
    """Milliseconds of one prefill, and its peak memory where the device counts it."""
    milliseconds, beside = prefill_index.prefill(model, cache, ids, chunk)
    if model.device.type != "cuda":
        return milliseconds, {}
    peak = torch.cuda.max_memory_allocated()
    return milliseconds, {"peak_gib": peak / 2**30, "beside_gib": beside / 2**30}
