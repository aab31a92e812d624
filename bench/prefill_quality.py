"""What does a sparse prefill keep of the attention, and what does that do to predictions?

SmolLM2-135M. Perplexity of 4,096 tokens of *Persuasion* read at once, and KL divergence from dense;
the same for a second copy of 1,024 tokens after a gap of 1,024, which only the first copy predicts;
and a passkey in 4,096 tokens at three depths of two fillers, decoded by retrieval. Density is the
share of the causal blocks that is attended, mass that of the exact weight which they hold, both
means over the sparse layers, query heads and queries of the first text.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fierpatch
from bench.options import add_index, index_settings
from bench.rows import save, table
from fierpatch import FierConfig
from fierpatch.evaluate import metrics, smollm2, tasks
from fierpatch.evaluate.texts import persuasion
from fierpatch.flex import Span
from fierpatch.flex.blocks import KEY_BLOCK, QUERY_BLOCK, candidate_blocks
from fierpatch.hf.checkpoints import load

COLUMNS = ["scores", "prefill_mass", "density", "mass", "mass_p5", "perplexity", "over_dense", "kl"]
COLUMNS += ["copy_perplexity", "copy_over_dense", "copy_kl", "found", "of"]
ROWS_AT_ONCE = 512


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench prefill_quality", description=__doc__)
    parser.add_argument("--model", help="id or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--mass", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--scores", nargs="+", choices=("index", "keys"), default=["index", "keys"])
    parser.add_argument("--budget", type=int, default=128, help="tokens attended at least")
    parser.add_argument("--dense-layers", type=int, default=2)
    parser.add_argument("--no-passkey", action="store_true", help="perplexities alone")
    add_index(parser)
    parser.add_argument("--output", type=Path, help="the file of rows")
    options = parser.parse_args(arguments)
    model, tokenizer = load(
        options.model or smollm2.fetch(), dtype=torch.float32, device=options.device
    )
    rows: list[dict[str, Any]] = []
    base: list[Tensor] = []
    texts = prompts(tokenizer, options.tokens, model.device)
    for scores, mass in [("", None), *product(options.scores, options.mass)]:
        settings = FierConfig(
            budget=options.budget,
            dense_layers=options.dense_layers,
            prefill="dense" if mass is None else "sparse",
            prefill_mass=mass or 1.0,
            prefill_scores=scores or FierConfig.prefill_scores,
            **index_settings(options),
        )
        row: dict[str, Any] = {"scores": scores, "prefill_mass": mass}
        row |= measure(model, texts, settings, base)
        if not options.no_passkey:
            row |= passkeys(model, tokenizer, settings, options.tokens)
        row |= {"budget": options.budget, "tokens": options.tokens, **index_settings(options)}
        rows.append(row)
        print(row, flush=True)
    for row in rows:
        row["over_dense"] = row["perplexity"] / rows[0]["perplexity"] - 1
        row["copy_over_dense"] = row["copy_perplexity"] / rows[0]["copy_perplexity"] - 1
    print(table(rows, COLUMNS))
    print("saved", save("prefill_quality", options.device, rows, options.output))


def prompts(tokenizer: Any, tokens: int, device: torch.device) -> list[tuple[Tensor, slice]]:
    """Ids ``[1, S]`` of both texts, and which of their tokens are to be predicted."""
    text = persuasion()[20_000:]
    task = tasks.second_copy(tokenizer, text, tokens // 4, tokens // 4)
    novel = tokenizer(text[: 8 * tokens]).input_ids[:tokens]
    return [
        (torch.tensor([novel], device=device), slice(1, tokens)),
        (torch.tensor([task.ids], device=device), slice(task.start, task.stop)),
    ]


@dataclass
class Held:
    """Blocks chosen, blocks that there are, and the exact weight that each query's blocks hold."""

    chosen: float = 0.0
    causal: float = 0.0
    masses: list[Tensor] = field(default_factory=list)

    def watch(self, layer: Any) -> None:
        """Have the prompts of a layer of our cache counted from now on."""
        attend = layer.attend_prompt

        def attend_prompt(query: Tensor, keys: Tensor, values: Tensor, **logits: Any) -> Tensor:
            def count(span: Span, chosen: Tensor) -> None:
                self.count(query, keys, span, chosen, logits["scale"])

            layer.block_observer = count
            return attend(query, keys, values, **logits)

        layer.attend_prompt = attend_prompt

    def count(self, query: Tensor, keys: Tensor, span: Span, chosen: Tensor, scale: float) -> None:
        """Add one span of queries, of a prompt without padding."""
        self.causal += chosen.shape[1] * float(candidate_blocks(span).sum())
        self.chosen += float(chosen.sum())
        groups = query.shape[1] // keys.shape[1]
        token = torch.arange(span.length, device=query.device)
        for first in range(span.rows.start, span.rows.stop, ROWS_AT_ONCE):
            row = torch.arange(first, min(first + ROWS_AT_ONCE, span.rows.stop))
            logits = query[:, :, row] @ keys.repeat_interleave(groups, 1).mT * scale
            logits = logits.masked_fill(token > span.stored + row[:, None], -torch.inf)
            allowed = chosen[:, :, row // QUERY_BLOCK - span.first]
            allowed = allowed.repeat_interleave(KEY_BLOCK, 3)[..., : span.length]
            self.masses.append((logits.softmax(-1) * allowed).sum(-1).flatten())

    def columns(self) -> dict[str, Any]:
        """Columns of a row, none where nothing was counted."""
        if not self.masses:
            return {}
        masses = torch.cat(self.masses)
        low = masses.kthvalue(max(len(masses) // 20, 1)).values
        return {
            "density": self.chosen / self.causal,
            "mass": float(masses.mean()),
            "mass_p5": float(low),
        }


def measure(
    model: Any, texts: list[tuple[Tensor, slice]], settings: FierConfig, base: list[Tensor]
) -> dict[str, Any]:
    """Columns of a row; the first call, which is dense, leaves its logits in `base`."""
    columns: dict[str, Any] = {}
    for place, (ids, part) in enumerate(texts):
        held = Held()
        with fierpatch.apply(model, settings) as handle, torch.inference_mode():
            cache = handle.new_cache()
            if place == 0:
                for layer in cache.stores.values():
                    held.watch(layer)
            logits = model(ids, past_key_values=cache).logits
        predictions, targets = logits[:, part.start - 1 : part.stop - 1], ids[:, part]
        if len(base) == place:
            base.append(predictions.clone())
        name = "copy_" if place else ""
        columns |= {
            f"{name}perplexity": metrics.perplexity(predictions, targets),
            f"{name}kl": metrics.logit_kl(base[place], predictions),
            **held.columns(),
        }
    return columns


def passkeys(model: Any, tokenizer: Any, settings: FierConfig, tokens: int) -> dict[str, int]:
    """In how many prompts the key is found by greedy decoding of 16 tokens."""
    hits = []
    for filler in ("novel", "repeat"):
        for depth in (0.1, 0.5, 0.9):
            task = tasks.passkey(tokenizer, tokens, depth, filler, seed=0)
            ids = torch.tensor([task.prompt_ids], device=model.device)
            with fierpatch.apply(model, settings):
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
                )
            hits.append(tasks.found(task.answer, tokenizer.decode(output[0, ids.shape[1] :])))
    return {"found": sum(hits), "of": len(hits)}
