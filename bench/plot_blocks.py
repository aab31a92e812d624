"""Which blocks of a text does a sparse prefill attend? Draws one layer and query head of it.

SmolLM2-135M reads the beginning of *Persuasion*, or a file. Every row is a block of queries, every
column a block of keys, in the order of the text, of whose words each row is named by its first.
Needs matplotlib, as `plot` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fierpatch
from bench.rows import RESULTS
from fierpatch import FierConfig
from fierpatch.evaluate import smollm2
from fierpatch.evaluate.texts import persuasion
from fierpatch.flex import Span
from fierpatch.flex.blocks import KEY_BLOCK, QUERY_BLOCK
from fierpatch.hf.checkpoints import load

WORDS = 4  # tokens that name a block of queries
INCHES = 0.16  # a row


def main(arguments: list[str]) -> None:
    """Draw the blocks and save the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench plot_blocks", description=__doc__)
    parser.add_argument("--model", help="id or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--text", type=Path, help="a file instead of the novel")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--head", type=int, default=0, help="query head")
    parser.add_argument("--mass", type=float, default=FierConfig.prefill_mass)
    parser.add_argument("--budget", type=int, default=128, help="tokens attended at least")
    parser.add_argument("--output", type=Path, default=RESULTS / "blocks.svg", help=".svg or .png")
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model or smollm2.fetch(), dtype=torch.float32, device="cpu")
    text = options.text.read_text() if options.text else persuasion()
    ids = tokenizer(text[: 8 * options.tokens]).input_ids[: options.tokens]
    settings = FierConfig(budget=options.budget, prefill="sparse", prefill_mass=options.mass)
    chosen = choice(model, torch.tensor([ids]), settings, options.layer)
    if not 0 <= options.head < len(chosen):
        raise SystemExit(f"head {options.head} is none of the {len(chosen)} query heads")
    starts = [tokenizer.decode(ids[i : i + WORDS]) for i in range(0, len(ids), QUERY_BLOCK)]
    title = f"layer {options.layer}, query head {options.head}, mass {options.mass}"
    draw(chosen[options.head], [" ".join(start.split()) for start in starts], title, options.output)
    print("saved", options.output)


def choice(model: Any, ids: Tensor, settings: FierConfig, layer: int) -> Tensor:
    """The blocks that a layer chose of a prompt ``[1, S]``: bool ``[Hq, blocks, key blocks]``."""
    parts: list[Tensor] = []

    def keep(span: Span, chosen: Tensor) -> None:
        parts.append(chosen[0])

    with fierpatch.apply(model, settings) as handle, torch.inference_mode():
        cache = handle.new_cache()
        store = cache.stores.get(layer)
        if store is None or store.is_dense:
            sparse = [number for number, each in cache.stores.items() if not each.is_dense]
            raise SystemExit(f"layer {layer} has no choice: those that have are {sparse}")
        store.block_observer = keep
        model(ids, past_key_values=cache, logits_to_keep=1)
    return torch.cat(parts, 1)


def draw(chosen: Tensor, names: list[str], title: str, path: Path) -> None:
    """A picture of ``[blocks, key blocks]`` with a name for every row."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = chosen.shape
    low = torch.arange(columns) * KEY_BLOCK < (torch.arange(rows)[:, None] + 1) * QUERY_BLOCK
    # White is what comes later, grey what is left out.
    shades = torch.where(chosen, 0.0, torch.where(low, 0.85, 1.0))
    size = max(5.0, 2.5 + INCHES * columns / 1.5), max(3.0, 1.0 + INCHES * rows)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.imshow(shades.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_yticks(range(rows), names, fontsize=6)
    axes.set_xlabel(f"blocks of {KEY_BLOCK} keys")
    axes.set_ylabel(f"blocks of {QUERY_BLOCK} queries, by their first words")
    density = float(chosen.sum() / low.sum())
    axes.set_title(f"{title}: {density:.0%} of the causal blocks", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
