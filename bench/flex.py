"""What does FlexAttention take over a selection: to update its mask, and to attend in both modes?

One decode step of a layer of the shape of Llama 3.1 8B with random keys, beside torch's dense
attention in the same run, timed as `bench.decode` times it. The selection is random, or in runs of
64 tokens. Rows of "mask" read K and V where they lie, block by block; rows of "compact" gather the
selected rows and read those. What either needs beforehand, scores and a top-k, is counted apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.decode import Case, attempt, filled_layer, timer_row
from bench.peers import dense
from bench.rows import reason, save, table
from bench.timing import copy_bandwidth
from fierpatch import FierConfig
from fierpatch.flex import BLOCK_SIZES, QueryLayout, SelectionMask, selected_attention
from fierpatch.flex.fused import Form, attend, kernel_options
from fierpatch.flex.rows import gather_rows

RUN = 64  # tokens of a run of a clustered selection
COLUMNS = ["what", "selection", "block_size", "blocks", "batch", "context", "us", "us_p80", "ratio"]

Function = Callable[[], object]


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench flex", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--case", nargs="+", default=["1x32768", "1x131072", "8x32768"], help="batch x context"
    )
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument(
        "--block-size", type=int, nargs="+", default=[16, 64, 128], choices=BLOCK_SIZES
    )
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, help="the file of rows")
    options = parser.parse_args(arguments)
    is_cpu = options.device == "cpu"
    bandwidth = copy_bandwidth(options.device, 1 << (26 if is_cpu else 30))
    rows = [timer_row(options.device, options.repeats) | {"copy_gb_s": bandwidth / 1e9}]
    for text in options.case:
        batch, context = map(int, text.split("x"))
        case = Case(batch, context, device=options.device)
        with torch.no_grad():
            rows += measure(case, options.budget, options.block_size, options.repeats)
        measured = [row for row in rows if row.get("context") == context]
        print(table([row for row in measured if row["batch"] == batch], COLUMNS))
        for row in measured:
            if "reason" in row:
                print(f"not measured: {row['what']}: {row['reason']}")
        # After each case, so that a run cut short keeps what it has.
        path = save("flex", options.device, rows, options.output)
        if not is_cpu:
            torch.cuda.empty_cache()
    print("saved", path)


def measure(
    case: Case, budget: int, block_sizes: list[int], repeats: int, *, with_dense: bool = True
) -> list[dict[str, Any]]:
    """Rows of one case; `with_dense` also has FlexAttention attend to every token."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # past its limit of recompilations a call would be an error
    query = case.random(case.num_heads, 1)
    keys, values = (case.random(case.num_kv_heads, case.context) for _ in range(2))
    rows: list[dict[str, Any]] = []

    def clock(functions: dict[str, Function], **columns: Any) -> None:
        for name, function in functions.items():
            rows.append({"what": name, **columns, **attempt(function, case.device, repeats)})

    clock(dense(query, keys, values))
    best = min((row["us"] for row in rows if "us" in row), default=None)
    if with_dense:
        clock({"FlexAttention dense": dense_flex(query, keys, values)})
    clock(retrieval(case, budget, query, keys, values))
    for selection in ("random", "runs"):
        lists = selected(case, budget, in_runs=selection == "runs")
        if query.is_cuda:
            clock({"Triton over rows": triton(query, keys, values, lists)}, selection=selection)
        for block_size in block_sizes:
            columns = {"selection": selection, "block_size": block_size}
            masked, num_blocks = by_mask(query, keys, values, lists, block_size)
            clock(masked, **columns, blocks=num_blocks)
            clock(by_rows(query, keys, values, lists, block_size), **columns)
    shared = {
        "batch": case.batch,
        "context": case.context,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "budget": budget,
        "repeats": repeats,
    }
    for row in rows:
        if best is not None and "us" in row:
            row["ratio"] = row["us"] / best
    return [row | shared for row in rows]


def selected(case: Case, budget: int, *, in_runs: bool) -> Tensor:
    """Ascending token indices ``[B, H, 1, K]``, other ones for each KV head."""
    size = RUN if in_runs else 1
    lead = (case.batch, case.num_kv_heads)
    count = min(budget, case.context) // size
    order = torch.rand(*lead, case.context // size).argsort(-1)[..., :count]
    starts = order.sort(-1).values * size
    lists = (starts[..., None] + torch.arange(size)).flatten(2)
    return lists[:, :, None].to(case.device)


def dense_flex(query: Tensor, keys: Tensor, values: Tensor) -> Function:
    """FlexAttention over every token, the query group folded as in the rest."""
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    # With enable_gqa the kernel is a slower one.
    folded = query.view(*keys.shape[:2], -1, query.shape[3])  # [B, H, G, D]
    options = kernel_options(keys, values, max(BLOCK_SIZES))
    return lambda: compiled(folded, keys, values, kernel_options=options)


def retrieval(
    case: Case, budget: int, query: Tensor, keys: Tensor, values: Tensor
) -> dict[str, Function]:
    """Scores and selection of a layer under ``backend="flex"``."""
    settings = FierConfig(budget=budget, compile=True, backend="flex")
    try:
        layer = filled_layer(case, settings, keys, values)
    except Exception as error:
        return {"scores and select": partial(_refuse, reason(error))}
    store = layer.store
    assert store is not None
    scale = query.shape[3] ** -0.5
    return {
        "scores and select": lambda: layer.operators.retrieve(
            query, store.rows, layer.state, layer.counters, None, None, scale, 0.0
        )
    }


def by_mask(
    query: Tensor, keys: Tensor, values: Tensor, lists: Tensor, block_size: int
) -> tuple[dict[str, Function], float]:
    """The update of a mask in place, attention under it, and both as a patched model calls them."""
    batch_size, num_kv_heads, length, _ = keys.shape
    num_groups = query.shape[1] // num_kv_heads
    layout = QueryLayout(query.shape[1], 1, num_groups)
    mask = SelectionMask.empty(
        layout,
        batch_size=batch_size,
        num_lists=num_kv_heads,
        length=length,
        block_size=block_size,
        device=keys.device,
    )
    update = partial(mask.update, lists, is_ascending=True)
    update()
    folded = query.view(batch_size, num_kv_heads, num_groups, -1)
    form = Form(layout, block_size, query.shape[3] ** -0.5, 0.0, 1, False)
    under = partial(_compiled(attend), folded, keys, values, mask.words, mask.num_blocks,
                    mask.block_indices, None, form)  # fmt: skip

    both = partial(
        _compiled(selected_attention), query, keys, values, lists, scale=form.scale, mode="mask",
        block_size=block_size, is_ascending=True,
    )  # fmt: skip
    functions: dict[str, Function] = {
        "mask: update": _compiled(update),
        "mask: attention": under,
        "mask: both": both,
    }
    return functions, mask.num_blocks.float().mean().item()


def by_rows(
    query: Tensor, keys: Tensor, values: Tensor, lists: Tensor, block_size: int
) -> dict[str, Function]:
    """Gathering rows, attention over them, and both as a patched model calls it."""
    gather = partial(
        _compiled(gather_rows), keys, values, lists, with_sink=False, block_size=block_size
    )
    num_groups = query.shape[1] // keys.shape[1]
    layout = QueryLayout(query.shape[1], 1, num_groups)
    form = Form(layout, block_size, query.shape[3] ** -0.5, 0.0, 1, False)
    folded = query.view(*keys.shape[:2], num_groups, -1)
    both = partial(
        _compiled(selected_attention), query, keys, values, lists, scale=form.scale,
        mode="compact", block_size=block_size, is_ascending=True,
    )  # fmt: skip
    return {
        "compact: gather": gather,
        "compact: attention": partial(_compiled(attend), folded, *gather(), None, form),
        "compact: both": both,
    }


def triton(query: Tensor, keys: Tensor, values: Tensor, lists: Tensor) -> Function:
    """The kernel of ``backend="triton"`` over the same rows."""
    from fierpatch.kernels.attention import gather_attention

    counters = torch.tensor([keys.shape[2]] * 4, device=keys.device)
    arrivals = torch.zeros(lists.shape[0] * lists.shape[1], dtype=torch.int32, device=keys.device)
    return lambda: gather_attention(
        query, keys, values, lists, scale=query.shape[3] ** -0.5, counters=counters,
        arrivals=arrivals,
    )  # fmt: skip


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _refuse(message: str) -> None:
    raise RuntimeError(message)
