"""How well does retrieval predict a second copy of a text, for which it must find the first?

SmolLM2-135M reads 1,024 tokens of *Persuasion*, 1,024 more, and then the first 1,024 again. The
first two parts are a dense prefill shared by all settings; the copy is decoded through retrieval
with the true tokens fed back. Perplexity of the copy, and the KL divergence of every prediction
from dense. Bytes are those scanned and held of a token and KV head, and those read of a candidate.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import fierpatch
from bench.options import BYTES, TRIAL, add_trial, index_bytes, trial_columns, trials
from bench.prompts import prefill
from bench.rows import save, table
from fierpatch import FierConfig
from fierpatch.evaluate import metrics, smollm2, tasks
from fierpatch.evaluate.texts import persuasion
from fierpatch.hf.checkpoints import load
from fierpatch.ops.arguments import layer_index


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench second_copy", description=__doc__)
    parser.add_argument("--model", help="id or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--gap", type=int, default=1024)
    parser.add_argument("--budget", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--step", type=int, default=1, help="tokens decoded at a time, up to 8")
    add_trial(parser)
    options = parser.parse_args(arguments)
    tried = trials(options)
    model, tokenizer = load(
        options.model or smollm2.fetch(), dtype=torch.float32, device=options.device
    )
    task = tasks.second_copy(tokenizer, persuasion()[20_000:], options.tokens, options.gap)
    ids = torch.tensor([task.ids], device=model.device)
    targets = ids[:, task.start : task.stop]
    prompt = prefill(model, ids[:, : task.start])
    with torch.inference_mode():
        dense = predictions(model, prompt.cache_for(model, FierConfig()), prompt, targets, 256)
    base = metrics.perplexity(dense, targets)
    head_dim = next(iter(prompt.cache.stores.values())).keys.shape[3]
    rows: list[dict[str, Any]] = [
        {"index": "dense", "perplexity": base, "over_dense": 0.0, "kl": 0.0}
    ]
    for name, settings in tried:
        with fierpatch.apply(model, settings), torch.inference_mode():
            cache = prompt.cache_for(model, settings)
            logits = predictions(model, cache, prompt, targets, options.step)
        perplexity = metrics.perplexity(logits, targets)
        rows.append(
            {
                **trial_columns(name, settings),
                **index_bytes(layer_index(settings, head_dim), by_keys=settings.refines_by_keys),
                "perplexity": perplexity,
                "over_dense": perplexity / base - 1,
                "kl": metrics.logit_kl(dense, logits),
            }
        )
        print(rows[-1], flush=True)
    for row in rows:
        row |= {"tokens": options.tokens, "gap": options.gap, "step": options.step}
    print(table(rows, [*TRIAL, *BYTES, "perplexity", "over_dense", "kl"]))
    print("saved", save("second_copy", options.device, rows, options.output))


def predictions(model: Any, cache: Any, prompt: Any, targets: Tensor, step: int) -> Tensor:
    """Logits ``[1, n, V]`` that predict each target from the prompt and the targets before it."""
    logits = [prompt.logits]
    fed = targets[:, :-1]
    for start in range(0, fed.shape[1], step):
        logits.append(model(fed[:, start : start + step], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)
