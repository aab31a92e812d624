"""What does one layer's decode step cost, and its stages, against dense attention?

A layer of the shape of Llama 3.1 8B with random keys. The peers are torch's dense attentions in the
same run and the time that the memory needs to deliver K and V. Times are of calls in a CUDA graph
with a cold L2, so launches by the host are not in them; on a CPU they are plain calls. The layer
holds 64 tokens more than the dense peers read, so that an append finds a group half full.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.options import add_index, index_settings
from bench.peers import dense, pieces
from bench.rows import reason, save, table
from bench.synthetic import CALIBRATION_WINDOW
from bench.timing import CALLS, copy_bandwidth, replays, summary
from fierpatch import FierConfig
from fierpatch.cache import LayerCache

EXTRA = 64  # tokens decoded after the prompt; the timer decodes a few more
CROSSOVER_LENGTHS = (2048, 4096, 8192, 16_384, 32_768)


@dataclass(frozen=True)
class Case:
    """One layer: batch, tokens in its cache, heads and head dimension, and where it is."""

    batch: int
    context: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    device: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def random(self, num_heads: int, length: int) -> Tensor:
        shape = (self.batch, num_heads, length, self.head_dim)
        return torch.randn(shape, dtype=self.dtype, device=self.device)


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench decode", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--case",
        nargs="+",
        default=["1x8192", "1x32768", "1x131072", "8x32768"],
        help="batch x context; 1x1048576 for a million tokens",
    )
    parser.add_argument("--crossover", action="store_true", help="2K to 32K, and where we are even")
    parser.add_argument("--budget", type=int, default=1024)
    add_index(parser)
    parser.add_argument("--backend", help="triton, or auto on a CPU")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, help="the file of rows")
    options = parser.parse_args(arguments)
    is_cpu = options.device == "cpu"
    settings = FierConfig(
        budget=options.budget,
        compile=True,
        backend=options.backend or ("auto" if is_cpu else "triton"),
        **index_settings(options),
    )
    sizes = [(int(b), int(s)) for b, s in (text.split("x") for text in options.case)]
    if options.crossover:
        sizes = [(1, length) for length in CROSSOVER_LENGTHS]
    bandwidth = copy_bandwidth(options.device, 1 << (26 if is_cpu else 30))
    rows = [timer_row(options.device, options.repeats) | {"copy_gb_s": bandwidth / 1e9}]
    for batch, context in sizes:
        case = Case(batch, context, device=options.device)
        with torch.no_grad():
            measured = measure(case, settings, bandwidth, options.repeats)
        print(table(measured, ["what", "batch", "context", "us", "us_p20", "us_p80", "ratio"]))
        for row in measured:
            if "reason" in row:
                print(f"not measured: {row['what']}: {row['reason']}")
        rows += measured
        # After each case, so that a run cut short keeps what it has.
        path = save("decode", options.device, rows, options.output)
        if not is_cpu:
            torch.cuda.empty_cache()
    if options.crossover:
        rows.append({"what": "crossover", "batch": 1, **crossover(rows)})
        print("as fast as the best dense peer:", rows[-1]["reason"])
        path = save("decode", options.device, rows, options.output)
    print(f"copy {bandwidth / 1e9:.0f} GB/s; an addition {rows[0].get('us', 0.0):.2f} us")
    print("saved", path)


def measure(
    case: Case, settings: FierConfig, bandwidth: float, repeats: int
) -> list[dict[str, Any]]:
    """Rows of one case; `bandwidth` in bytes a second."""
    torch.manual_seed(0)
    query = case.random(case.num_heads, 1)
    keys, values = (case.random(case.num_kv_heads, case.context) for _ in range(2))
    nbytes = 2 * keys.numel() * keys.element_size()
    rows: list[dict[str, Any]] = [{"what": "dense floor", "us": nbytes / bandwidth * 1e6}]

    def clock(
        functions: dict[str, Callable[[], object]], before: Callable[[], object] = lambda: None
    ) -> list[dict[str, Any]]:
        return [
            {"what": name, **attempt(function, case.device, repeats, before)}
            for name, function in functions.items()
        ]

    dense_rows = clock(dense(query, keys, values))
    rows += dense_rows + clock(pieces(keys, values, min(settings.budget, case.context)))
    try:
        layer = filled_layer(case, settings, keys, values)
        saved = layer.counters.clone()
        back = lambda: layer.counters.copy_(saved)  # noqa: E731  # appends move it on
        rows += clock(whole(layer, query), back)
        for row in clock(stages(layer, query), back):
            rows.append(row | {"what": f"  {row['what']}"})
        held = {"index_mib": layer.facts.index_nbytes / 2**20}
    except Exception as error:
        # The peers' rows are worth keeping whatever ours does.
        rows.append({"what": "ours", "reason": reason(error)})
        held = {}
    best = min((row["us"] for row in dense_rows if "us" in row), default=None)
    for row in rows:
        if best is not None and "us" in row:
            row["ratio"] = row["us"] / best
    shared = {
        "batch": case.batch,
        "context": case.context,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "budget": settings.budget,
        "index": settings.index,
        "bits": settings.bits,
        "refine": settings.refine,
        "refine_bits": settings.refine_bits,
        "backend": settings.backend,
        "repeats": repeats,
        "kv_mib": nbytes / 2**20,
        **held,
    }
    return [row | shared for row in rows]


def attempt(
    function: Callable[[], object],
    device: str,
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Microseconds, or the reason why there are none."""
    try:
        return summary(replays(function, device=device, count=repeats, before=before), "us")
    except Exception as error:
        return {"reason": reason(error)}


def timer_row(device: str, repeats: int) -> dict[str, Any]:
    """The least that anything takes here: an addition to one number."""
    number = torch.zeros(1, device=device)
    return {"what": "one addition", **attempt(lambda: number.add_(1), device, repeats)}


def crossover(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where "total" falls to the best dense peer, interpolated between the measured lengths."""
    points = sorted((row["context"], row["ratio"]) for row in rows if row["what"] == "total")
    for (short, above), (long, below) in pairwise(points):
        if above >= 1 > below:
            context = round(short + (long - short) * (above - 1) / (above - below))
            return {"context": context, "reason": f"from {context} tokens on"}
    if not points:
        return {"context": None, "reason": "nothing measured"}
    if points[0][1] < 1:
        return {"context": None, "reason": f"at {points[0][0]} tokens already"}
    return {"context": None, "reason": f"not up to {points[-1][0]} tokens"}


def filled_layer(case: Case, settings: FierConfig, keys: Tensor, values: Tensor) -> LayerCache:
    """A static layer that holds a prompt of these keys and `EXTRA` tokens decoded after it."""
    layer = LayerCache(settings, capacity=case.context + EXTRA + CALLS, is_static=True)
    layer.update(keys, values)
    layer.index_prompt(case.random(case.num_heads, min(case.context, CALIBRATION_WINDOW)))
    for _ in range(EXTRA // settings.max_query_length):
        key, value = (case.random(case.num_kv_heads, settings.max_query_length) for _ in range(2))
        layer.update(key, value)
    return layer


def whole(layer: LayerCache, query: Tensor) -> dict[str, Callable[[], object]]:
    """A decode step of the layer and its two calls, as functions without arguments."""
    shape = (query.shape[0], layer.keys.shape[1], 1, query.shape[3])
    key, value = (torch.randn(shape, dtype=query.dtype, device=query.device) for _ in range(2))
    scale = query.shape[3] ** -0.5

    def append() -> None:
        layer.update(key, value)

    def attend() -> Tensor:
        return layer.attend(query, visible=None, scale=scale)

    def total() -> Tensor:
        append()
        return attend()

    return {"append": append, "attend": attend, "total": total}


def stages(layer: LayerCache, query: Tensor) -> dict[str, Callable[[], object]]:
    """The stages of `LayerCache.attend` by kernels, as functions without arguments."""
    if layer.operators.name == "reference":
        return {}
    from fierpatch.kernels import attention, retrieve
    from fierpatch.kernels.logits import Logits
    from fierpatch.kernels.shape import Scratch, Shape

    config, scale = layer.config, query.shape[3] ** -0.5
    state, counters, logits = layer.state, layer.counters, Logits(scale)
    index, per_query_head = layer.operators.index, config.per_query_head
    shape = Shape.of(
        index,
        query,
        state[0],
        budget=config.budget,
        per_query_head=per_query_head,
        refine=config.refine,
    )
    scratch = Scratch(shape, query.device)
    arrivals = torch.zeros(shape.rows, dtype=torch.int32, device=query.device)

    def score() -> None:
        retrieve.score(shape, scratch, query, state, counters, logits)

    def select() -> Tensor:
        return retrieve.select(shape, scratch, counters, sinks=config.sinks, recent=config.recent)

    def score_candidates() -> None:
        keys = layer.keys if config.refines_by_keys else None
        retrieve.score_candidates(shape, scratch, query, state, logits, keys)

    def select_candidates() -> Tensor:
        return retrieve.select_candidates(shape, scratch, sinks=config.sinks, recent=config.recent)

    score()
    chosen = select()
    second: dict[str, Callable[[], object]] = {}
    if shape.refine:
        score_candidates()
        chosen = select_candidates()
        second = {"candidates": score_candidates, "select of them": select_candidates}
    return {
        "query and scores": score,
        "select": select,
        **second,
        "attend to rows": lambda: attention.gather_attention(
            query,
            layer.keys,
            layer.values,
            chosen,
            scale=scale,
            counters=counters,
            arrivals=arrivals,
        ),
        "attend to all": lambda: attention.dense_attention(
            query, layer.keys, layer.values, counters, scale=scale, arrivals=arrivals
        ),
    }
