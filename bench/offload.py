"""What does it cost to keep K and V on the host, and what does it save?

Whole decode steps of a model with random weights over a filled cache, compiled into one CUDA graph,
with K and V on the device and on the host; queries turn so that consecutive selections overlap as
asked, and the estimates by which a prefetch goes find the share of a selection that those of a real
model do (`python -m bench residency`). Prefill of a prompt both ways in turn, with its peak memory.
And how well a gather from the host hides behind the weights of a layer. `python -m bench plot`
draws the steps against context and overlap.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import fierpatch
from bench import ways
from bench.drift import Drift
from bench.options import add_index, index_settings
from bench.prefill_index import prefill
from bench.rows import RESULTS, read, reason, save, table
from bench.synthetic import SHAPES, fill, random_llama
from bench.timing import capture, queued, summary
from fierpatch import FierCache, FierConfig
from fierpatch.hot_set import ASKED, MISSED, NUM_COUNTS, PREFETCHED, USED, USEFUL, HotSet
from fierpatch.offload import MemoryPool
from fierpatch.offload.memory import HostMemory

WARM_UP = 8  # steps before the first sample, and after each change of the drift
HIDING_ROUNDS = 8
COLUMNS = ["what", "context", "overlap", "ms", "ms_p20", "ms_p80", "ratio", "hit", "device_mib"]


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench offload", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a dry run")
    parser.add_argument("--only", nargs="+", choices=("steps", "prefill", "hiding"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["resident", "offloaded"])
    parser.add_argument("--context", type=int, nargs="+", default=[131_072])
    parser.add_argument("--overlap", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.5, 0.0])
    parser.add_argument(
        "--share", type=float, default=0.81, help="of a selection that its estimate finds"
    )
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--hot-tokens", type=int, help="rows of the hot set; 4 budgets")
    add_index(parser)
    parser.add_argument("--prompt", type=int, default=32_768, help="tokens of the prefill")
    parser.add_argument("--rounds", type=int, default=3, help="of the prefill")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--backend", default="auto", help="of the operators")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--output", type=Path, help="the file of rows")
    parser.add_argument("--keep", action="store_true", help="keep the file's other rows")
    options = parser.parse_args(arguments)
    path = options.output or RESULTS / f"offload-{options.device}.jsonl"
    parts = options.only or ["hiding", "steps", "prefill"]
    settings = {
        "budget": options.budget,
        "hot_tokens": options.hot_tokens,
        **index_settings(options),
        "backend": options.backend,
    }
    earlier = read(path) if options.keep else []
    rows: list[dict[str, Any]] = []

    def keep(new: list[dict[str, Any]]) -> None:
        """Save after each measurement, so that a run cut short keeps what it has."""
        rows.extend(row | settings for row in new)
        print(table(new, COLUMNS), flush=True)
        for row in new:
            if "reason" in row:
                print(f"not measured: {row['what']}: {row['reason']}", flush=True)
        measured = {identity(row) for row in rows}
        kept = [row for row in earlier if identity(row) not in measured]
        save("offload", options.device, with_ratios(rows), path, kept=kept)

    if "hiding" in parts:
        keep(hiding(options))
    if parts == ["hiding"]:
        return
    model = random_llama(options.model, options.device, options.layers)
    with torch.no_grad():
        if "steps" in parts:
            for context in options.context:
                for name in options.ways:
                    ways.release(model)
                    try:
                        keep(steps(model, name, context, settings, options))
                    except Exception as error:
                        row = {"what": name, "context": context, "layers": depth(model)}
                        keep([row | {"reason": reason(error)}])
        if "prefill" in parts:
            ways.release(model)
            keep(prefills(model, options, settings))
    print(table(with_ratios(rows), COLUMNS))
    if "steps" in parts:
        print(f"to draw the steps: python -m bench plot --input {path}, or with --by overlap too")


WAYS = {
    "resident": {"offload": False},
    "offloaded": {"offload": True},
    "offloaded, prefetch": {"offload": True, "prefetch": True},
}


def steps(
    model: Any, name: str, context: int, settings: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one way and context: a row for each overlap."""
    is_cuda = model.device.type == "cuda"
    weights = torch.cuda.memory_allocated() if is_cuda else 0
    count = len(options.overlap) * (options.steps + WARM_UP) + WARM_UP
    plan = ways.Plan(context, count, compiler=options.compiler)
    rows = []
    with fierpatch.apply(model, **settings, **WAYS[name], compile=True) as handle:
        cache = handle.new_cache(max_cache_len=plan.capacity)
        fill(model, cache, context)
        stores = cache.stores
        sparse = [store for store in stores.values() if not store.is_dense]
        drift = Drift(sparse, model.config.num_attention_heads)
        share = drift.estimate_for(options.share)
        forward = ways.compiled(model, plan)
        token = torch.ones(1, 1, dtype=torch.long, device=model.device)

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            forward(token, past_key_values=cache)

        for overlap in options.overlap:
            found = drift.turn_for(overlap)
            queued(step, device=str(model.device), count=1, warm_up=WARM_UP)
            before = tallies(sparse)
            samples = queued(step, device=str(model.device), count=options.steps, warm_up=0)
            row: dict[str, Any] = {
                "what": name,
                "context": context,
                "layers": depth(model),
                "overlap": overlap,
                "overlap_found": found,
                "estimate_finds": share,
                **summary(samples, "ms"),
                "steps": options.steps,
                **hits(before, tallies(sparse)),
            }
            rows.append(row)
        report = handle.report(cache)
        dense = sum(store.store.device_nbytes for store in stores.values() if store.is_dense)
        for row in rows:
            row["kv_mib"] = report.kv_bytes / 2**20
            row["host_mib"] = report.host_bytes / 2**20
            row["dense_mib"] = dense / 2**20
            if is_cuda:
                # Activations and the graph's own memory are in it.
                held = torch.cuda.memory_allocated() - weights - dense
                row["device_mib"] = held / 2**20
                row["device_share"] = held / report.kv_bytes
    return rows


def tallies(stores: list[Any]) -> torch.Tensor:
    """The sum of all hot sets' tallies; zeros where there are none."""
    found = [store.hot.tally.sum((0, 1)) for store in stores if store.hot is not None]
    return torch.stack(found).sum(0).cpu() if found else torch.zeros(NUM_COUNTS, dtype=torch.int64)


def hits(before: torch.Tensor, after: torch.Tensor) -> dict[str, float | None]:
    """What a hot set did in between."""
    done = (after - before).tolist()
    if not done[USED]:
        return {}
    return {
        "hit": 1 - done[MISSED] / done[USED],
        "prefetched": done[PREFETCHED] / done[USED],
        "useful": done[USEFUL] / done[ASKED] if done[ASKED] else None,
    }


def prefills(
    model: Any, options: argparse.Namespace, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of one prompt, with K and V on the device and on the host in turn."""
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, options.prompt), device=model.device)
    times: dict[str, list[float]] = {"prefill, resident": [], "prefill, offloaded": []}
    peaks: dict[str, int] = {}
    memory = MemoryPool()
    config = FierConfig.from_dict(settings)
    with fierpatch.apply(model, config):
        for _ in range(options.rounds + 1):
            for name in times:
                own = config.replace(offload=name.endswith("offloaded"))
                cache = FierCache(model.config, own, memory=memory)
                milliseconds, peaks[name] = prefill(model, cache, ids)
                times[name].append(milliseconds)
                del cache
    first = "prefill, resident"
    rows = []
    for name, samples in times.items():
        row = {"what": name, "context": options.prompt, "layers": depth(model)}
        row |= summary(samples[1:], "ms")
        row |= {"first_ms": samples[0], "peak_mib": peaks[name] / 2**20}
        row["saved_mib"] = (peaks[first] - peaks[name]) / 2**20
        row["ratio"] = row["ms"] / statistics.median(times[first][1:])
        rows.append(row)
    return rows


def hiding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of the weights of four layers, alone and beside a gather of 4 MiB for each.

    One linear layer after the other, as the model has them. The gather begins and ends where that
    of a prefetch does: before the MLP, and before the attention of the layer after.
    """
    from fierpatch.kernels import residency
    from fierpatch.kernels.ahead import side_stream

    device = torch.device(options.device)
    sizes = SHAPES["llama-8b"]
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], 4
    width = 2 * hidden // sizes["num_attention_heads"]
    heads, context, budget = sizes["num_key_value_heads"], 65_536, 1024
    dtype = torch.bfloat16
    kv = heads * width // 2
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
    shapes = [*attention, *mlp]
    weights = [
        [torch.randn(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(layers)
    ]
    memory = HostMemory(context * heads * width * 2, device)
    memory.grow(context * heads * width * 2)
    paired = memory.on_device((context, 1, heads, width), dtype)
    hot = HotSet.empty(2 * budget, context, 1, heads, width, paired)
    lists = torch.stack([torch.randperm(context, device=device)[:budget] for _ in range(heads)])
    lists = lists[None, :, None].contiguous()
    length = torch.ones(1, dtype=torch.int64, device=device)
    placed = residency.place(hot, lists)
    token = torch.randn(1, hidden, dtype=dtype, device=device)
    wide = torch.randn(1, inner, dtype=dtype, device=device)
    side = side_stream(device)

    def work(with_weights: bool, with_gather: bool) -> None:
        main = torch.cuda.current_stream(device)
        for number, layer in enumerate(weights):
            for place, matrix in enumerate(layer):
                if with_gather and place == len(attention):
                    side.wait_stream(main)
                    with torch.cuda.stream(side):
                        residency.fetch(hot, placed, lists, length, paired)
                if with_weights:
                    wanted = wide if matrix.shape[1] == inner else token
                    torch.nn.functional.linear(wanted, matrix)
                if with_gather and place == 2 and number:
                    main.wait_stream(side)
        if with_gather:
            main.wait_stream(side)

    graphs = {
        "weights": capture(lambda: work(True, False)),
        "gather": capture(lambda: work(False, True)),
        "weights beside gather": capture(lambda: work(True, True)),
    }
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(HIDING_ROUNDS):  # in turn, as a device slows down while it works
        for name, (graph, _output) in graphs.items():
            samples[name] += queued(graph.replay, device=options.device, count=10)
    rows = [{"what": name, "layers": layers, **summary(samples[name], "ms")} for name in graphs]
    return [row | {"ratio": row["ms"] / rows[0]["ms"]} for row in rows]


def depth(model: Any) -> int:
    """How many layers it has."""
    return int(model.config.num_hidden_layers)


def identity(row: dict[str, Any]) -> tuple[object, ...]:
    """What tells a row from others of the file."""
    names = ("what", "context", "overlap", "hot_tokens", "budget", "refine")
    # Rows from before there was this column are of the whole model.
    layers = row.get("layers", SHAPES["llama-8b"]["num_hidden_layers"])
    return (*(row.get(name) for name in names), layers)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each step's time over that of a resident one of the same context and overlap."""
    resident = {
        (row["context"], row["overlap"]): row["ms"]
        for row in rows
        if row["what"] == "resident" and "ms" in row
    }
    return [
        row | {"ratio": row["ms"] / resident[key]}
        if "ms" in row and (key := (row.get("context"), row.get("overlap"))) in resident
        else row
        for row in rows
    ]
