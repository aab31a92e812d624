"""Which share of the selected tokens lies on the device already, if it has room for a few?

SmolLM2-135M reads 7,168 tokens of *Persuasion* and decodes 240 more through retrieval: the true
ones, or its own greedy continuation. Every sparse layer and KV head has a hot set of R rows, from
which the least recently selected token leaves first; a selected token that lies there is a hit. The
newest token comes from the model and is neither hit nor miss. After 40 steps of warm-up, hits are
counted for the hot set alone; with the runners-up of a selection, the tokens ranked right behind
it, kept or fetched ahead of the next step; and beside tokens chosen before the layer's query is
known, by an estimate of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.hot_set import EMPTY, HotSet
from bench.prompts import prefill
from bench.rows import RESULTS, save, table
from bench.traces import Trace, record
from fierpatch import FierConfig
from fierpatch.evaluate import smollm2
from fierpatch.evaluate.texts import persuasion
from fierpatch.hf.checkpoints import load

WARM_UP = 40
COLUMNS = [
    "text", "budget", "rows", "what", "runners_up", "age", "hit", "hit_p20", "hit_worst_layer",
    "worst_layer", "misses", "fetched_ahead", "used", "used_next",
]  # fmt: skip


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench residency", description=__doc__)
    parser.add_argument("--model", help="id or path of a Llama; SmolLM2-135M-Instruct by default")
    parser.add_argument("--tokens", type=int, default=7168, help="of the prompt")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--budget", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rows", type=float, nargs="+", default=[1, 1.5, 2, 3, 4], help="budgets")
    parser.add_argument("--runners-up", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--age", type=int, nargs="+", default=[0, 8], help="of fetched runners-up")
    parser.add_argument("--text", nargs="+", default=["true", "greedy"], choices=["true", "greedy"])
    parser.add_argument("--start", type=int, default=20_000, help="character of the novel")
    parser.add_argument("--output", type=Path, default=RESULTS / "residency-cpu.jsonl")
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model or smollm2.fetch(), dtype=torch.float32, device="cpu")
    text = persuasion()[options.start :]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens + options.steps]
    prompt = prefill(model, ids[:, : options.tokens])
    rows: list[dict[str, Any]] = []
    for kind in options.text:
        for budget in options.budget:
            fed = ids[:, options.tokens :]
            trace = record(
                model, prompt, fed, FierConfig(budget=budget), is_greedy=kind == "greedy"
            )
            facts = {
                "text": kind, "budget": budget, "tokens": options.tokens, "steps": options.steps,
                "start": options.start,
            }  # fmt: skip
            new = measure(trace, options.rows, options.runners_up, options.age)
            rows += [facts | row for row in new]
            save("residency", "cpu", rows, options.output)
            print(table(rows[-len(new) :], COLUMNS), flush=True)
    print("saved", options.output)


def measure(
    trace: Trace, rows: list[float], shares: list[float], ages: list[int]
) -> list[dict[str, Any]]:
    """Rows of hits for every hot set, and what to do beside it."""
    budget = trace.selected.shape[2]
    results = []
    for multiple in rows:
        num_rows = int(multiple * budget)
        results.append({"what": "alone", "rows": multiple} | simulate(trace, num_rows))
        best = simulate(trace, num_rows, has_foresight=True)
        results.append({"what": "foresight", "rows": multiple} | best)
        for share in shares if multiple > 1 else []:
            ways = [("runners-up kept", None), *(("runners-up fetched", age) for age in ages)]
            for what, age in ways:
                counts = simulate(trace, num_rows, int(share * budget), age)
                facts = {"what": what, "rows": multiple, "runners_up": share, "age": age}
                results.append(facts | counts)
    for name, estimated in trace.estimated.items():
        for multiple in (0, *(multiple for multiple in rows if multiple > 1)):
            num_rows = int(multiple * budget)
            if multiple in (0, 2):
                counts = simulate(trace, num_rows, estimated=estimated, is_beside=True)
                results.append({"what": f"{name}, beside", "rows": multiple} | counts)
            if multiple:
                counts = simulate(trace, num_rows, estimated=estimated)
                results.append({"what": name, "rows": multiple} | counts)
    return results


def simulate(
    trace: Trace,
    num_rows: int,
    num_runners_up: int = 0,
    age: int | None = None,
    estimated: Tensor | None = None,
    is_beside: bool = False,
    has_foresight: bool = False,
) -> dict[str, Any]:
    """Hits, and rows fetched a KV head and step, of one hot set.

    Args:
        num_rows: R; 0 for no hot set.
        num_runners_up: so many are stamped after each step, below what the step selected.
        age: if given, those that do not lie in the hot set are fetched too, with the stamp that
            they would have so many steps ago.
        estimated: tokens ``[T, N, K]`` fetched for the step itself, ahead of what it selects.
        is_beside: whether they go to rows of their own for the step, not into the hot set.
        has_foresight: whether the token leaves that will not be selected for longest, which no
            policy without prefetch can better (Belady, 1966).
    """
    _, num_heads, budget = trace.selected.shape
    num_tokens = int(trace.selected.max()) + 1
    hot = HotSet(num_heads, num_rows, num_tokens)
    next_use = next_steps(trace.selected) if has_foresight else []
    hits: list[Tensor] = []
    fetched = used = used_next = wasted = 0
    for step, chosen in enumerate(trace.selected):
        if step == WARM_UP:
            hits, fetched, used, used_next, wasted = [], 0, 0, 0, 0
        is_hit = torch.zeros_like(chosen, dtype=torch.bool)
        if estimated is not None:
            early = estimated[step, :, :-1]  # without the newest
            if is_beside:
                is_ahead = torch.zeros(num_heads, num_tokens, dtype=torch.bool)
                is_ahead.scatter_(1, early, ~hot.holds(early))
                is_hit = is_ahead.gather(1, chosen)
                fetched += int(is_ahead.sum())
                used_next += int(is_hit.sum())
            else:
                put = hot.put(early, 2 * step - 1, ahead_at=step - 1)
                fetched += int(put.is_fetched.sum())
                wasted += put.num_wasted
        if num_rows:
            put = hot.put(chosen, 2 * step)
            if has_foresight:
                hot.stamp(chosen, -next_use[step])
            is_hit = is_hit | put.is_hit
            used += int((put.ahead_at != EMPTY).sum())
            used_next += int((put.ahead_at == step - 1).sum())
            wasted += put.num_wasted
        hits.append(is_hit[:, :-1])
        if num_runners_up:
            best = trace.runners_up[step, :, :num_runners_up]
            hot.put(best, 2 * step - 1, is_fetching=False, ahead_at=step)
            if age is not None:
                put = hot.put(best, 2 * (step - age) - 1, ahead_at=step)
                fetched += int(put.is_fetched.sum())
                wasted += put.num_wasted
    shares = torch.stack(hits).float().mean(2)  # [T, N]
    by_layer = shares.mean(0).unflatten(0, (-1, trace.heads_a_layer)).mean(1)
    hit = shares.mean().item()
    return {
        "hit": hit,
        "hit_p20": shares.flatten().quantile(0.2).item(),
        "hit_worst_layer": by_layer.min().item(),
        "worst_layer": int(by_layer.argmin()) + trace.first_layer,
        "misses": (1 - hit) * (budget - 1),
        "fetched_ahead": fetched / shares.numel(),
        "used": used / (used + wasted) if used + wasted else None,
        "used_next": used_next / fetched if fetched else None,
    }


def next_steps(selected: Tensor) -> list[Tensor]:
    """When each token of ``selected [T, N, K]`` is selected next: T times ``[N, K]``."""
    num_steps, num_heads, _ = selected.shape
    upcoming = torch.full((num_heads, int(selected.max()) + 1), num_steps)
    steps = []
    for step in reversed(range(num_steps)):
        steps.append(upcoming.gather(1, selected[step]))
        upcoming.scatter_(1, selected[step], step)
    return steps[::-1]
