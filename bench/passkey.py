"""At which budget is the passkey found wherever the dense model finds it?

SmolLM2-135M, prompts of 4,096 tokens, depths 0.1, 0.5 and 0.9 in two fillers, greedy decoding.
Prefill is dense and shared by all settings; every generated token comes out of retrieval.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fierpatch
from bench.options import TRIAL, add_trial, trial_columns, trials
from bench.prompts import prefill
from bench.rows import save, table
from fierpatch import FierConfig
from fierpatch.evaluate import smollm2, tasks
from fierpatch.hf.checkpoints import load


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench passkey", description=__doc__)
    parser.add_argument("--model", help="id or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--depth", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    add_trial(parser)
    options = parser.parse_args(arguments)
    tried = trials(options)
    model, tokenizer = load(
        options.model or smollm2.fetch(), dtype=torch.float32, device=options.device
    )
    found: dict[tuple[str, FierConfig | None], list[bool]] = {}
    for filler in ("novel", "repeat"):
        for depth in options.depth:
            task = tasks.passkey(tokenizer, options.tokens, depth, filler, seed=0)
            ids = torch.tensor([task.prompt_ids], device=model.device)
            prompt = prefill(model, ids[:, :-1])
            cache = prompt.cache_for(model, FierConfig())
            outcome = [answer(model, tokenizer, task, ids, cache)]
            found.setdefault(("dense", None), []).append(outcome[0])
            for name, settings in tried:
                with fierpatch.apply(model, settings):
                    cache = prompt.cache_for(model, settings)
                    is_found = answer(model, tokenizer, task, ids, cache)
                found.setdefault((name, settings), []).append(is_found)
                outcome.append(is_found)
            print(filler, depth, "".join("+" if hit else "-" for hit in outcome), flush=True)
    rows = [
        {
            **trial_columns(name, chosen),
            "found": sum(hits),
            "found_where_dense_does": sum(h and d for h, d in zip(hits, dense, strict=True)),
            "of": len(hits),
            "tokens": options.tokens,
        }
        for dense in [found["dense", None]]
        for (name, chosen), hits in found.items()
    ]
    print(table(rows, [*TRIAL, "found", "found_where_dense_does", "of"]))
    print("saved", save("passkey", options.device, rows, options.output))


def answer(model: Any, tokenizer: Any, task: Any, ids: torch.Tensor, cache: Any) -> bool:
    """Whether greedy decoding over the cached prompt gives the key within 16 tokens."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=16,
        do_sample=False,
    )
    return tasks.found(task.answer, tokenizer.decode(output[0, ids.shape[1] :]))
