"""How much of the exact attention weight does each index's selection hold on real keys?

A window of *Persuasion* goes through SmolLM2-135M once. From the third layer on, each index is
built from the layer's own post-RoPE keys through the library's packed state, calibrated by queries
before the last 512 positions, and asked for the best k tokens of 32 queries in those last 512. No
sinks, no recents: selection alone, once a KV head by the mean of softmax over the group. Refined is
out of four times as many candidates. Bytes are those scanned and held of a token and KV head, and
those read of a candidate.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bench.options import BYTES, index_bytes
from bench.rows import save, table
from fierpatch import ops
from fierpatch.evaluate import smollm2
from fierpatch.evaluate.texts import persuasion
from fierpatch.hf.checkpoints import load
from fierpatch.index import FierIndex, RotatedIndex
from fierpatch.reference import select_from_index
from fierpatch.select import attention_weights, top_k

BUDGETS = (32, 64, 128, 256, 512)
REFINE = 4
FIRST_LAYER = 2


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench attention_mass", description=__doc__)
    parser.add_argument("--model", help="id or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    model, tokenizer = load(
        options.model or smollm2.fetch(), dtype=torch.float32, device=options.device
    )
    text = persuasion()[20_000:]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens].to(model.device)
    rows = measure(model, ids)
    print(table(rows, ["index", *BYTES, *[f"k{k}" for k in BUDGETS]]))
    print("saved", save("attention_mass", options.device, rows))


def measure(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Rows of attention mass, mean over layers, KV heads and queries."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(BUDGETS), dtype=torch.float64))
    sizes: dict[str, dict[str, float]] = {}
    layers = 0

    def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
        nonlocal layers
        if module.layer_idx >= FIRST_LAYER:
            layers += 1
            for name, masses, size in layer_masses(query, key):
                sums[name] += masses
                sizes[name] = size
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("bench_capture", capture)
    AttentionMaskInterface.register("bench_capture", sdpa_mask)
    model.set_attn_implementation("bench_capture")
    with torch.inference_mode():
        model.model(ids, use_cache=False)
    return [
        {
            "index": name,
            **sizes[name],
            **{f"k{k}": (sums[name][i] / layers).item() for i, k in enumerate(BUDGETS)},
            "tokens": ids.shape[1],
            "layers": layers,
        }
        for name in sums
    ]


def layer_masses(query: Tensor, key: Tensor) -> list[tuple[str, Tensor, dict[str, float]]]:
    """For each index its name, the mass at every budget, and the columns `BYTES`."""
    _, _, length, head_dim = query.shape
    num_kv_heads, scale = key.shape[1], head_dim**-0.5
    positions = torch.arange(length - 512, length, 16, device=query.device)
    visible = (torch.arange(length, device=query.device) <= positions[:, None])[None, None]
    asked = query[:, :, positions]
    calibration = query[:, :, : length - 512 : 7]
    exact = asked.float().unflatten(1, (num_kv_heads, -1)) @ key.float().mT.unsqueeze(2)
    exact = exact.flatten(1, 2)
    weights = (exact * scale).masked_fill(~visible, -torch.inf).softmax(-1)
    candidates = [("exact", exact, scanned_whole(2.0 * head_dim))]
    for name, index in (
        ("rotated 2 bits", RotatedIndex(head_dim, bits=2)),
        ("rotated 1 bit", RotatedIndex(head_dim)),
        ("rotated 1 bit, g512", RotatedIndex(head_dim, group_size=512)),
        ("rotated 1 bit, not balanced", RotatedIndex(head_dim)),
        ("fier g32", FierIndex(head_dim)),
        ("fier g128", FierIndex(head_dim, group_size=128)),
    ):
        by = None if "not balanced" in name else calibration
        state = ops.build_index(index, key, query=by)
        scores = ops.index_scores(index, state, asked, length)
        candidates.append((name, scores, index_bytes(index)))
    candidates.append(("quest p16", quest_scores(asked, key), scanned_whole(head_dim / 4)))
    results = []

    def masses_of(choose: Callable[[int], Tensor]) -> Tensor:
        masses = []
        for budget in BUDGETS:
            chosen = choose(budget).repeat_interleave(query.shape[1] // num_kv_heads, 1)
            masses.append(weights.gather(-1, chosen).sum(-1).mean().double())
        return torch.stack(masses).cpu()

    for name, scores, size in candidates:
        priority = attention_weights(
            scores, num_kv_heads=num_kv_heads, scale=scale, visible=visible
        ).masked_fill(~visible, -torch.inf)
        results.append((name, masses_of(partial(top_k, priority)), size))

    def refined(refine_bits: int) -> tuple[str, Tensor, dict[str, float]]:
        """By codes of so many bits, or by the keys for 0."""
        index = RotatedIndex(head_dim, refine_bits=refine_bits)
        state = ops.build_index(index, key, query=calibration)

        def choose(budget: int) -> Tensor:
            return select_from_index(
                index, state, asked, length, budget=budget, sinks=0, recent=0, scale=scale,
                per_query_head=False, visible=visible, refine=REFINE,
                keys=None if refine_bits else key,
            )  # fmt: skip

        by = f"{refine_bits} bits" if refine_bits else "keys"
        size = index_bytes(index, by_keys=not refine_bits)
        return f"1 bit, refined by {by}", masses_of(choose), size

    return results + [refined(refine_bits) for refine_bits in (2, 3, 4, 0)]


def scanned_whole(size: float) -> dict[str, float]:
    """The columns `BYTES` of what is read for every token, all of it."""
    return dict(zip(BYTES, (size, 0.0, size), strict=True))


def quest_scores(query: Tensor, key: Tensor, page_size: int = 16) -> Tensor:
    """Quest (arXiv 2406.10774): the sum over channels of the larger product with a page's range."""
    length = key.shape[2]
    padding = -length % page_size
    pages = torch.nn.functional.pad(key.float(), (0, 0, 0, padding)).unflatten(2, (-1, page_size))
    low, high = pages.amin(3), pages.amax(3)  # [B, H, pages, D]
    grouped = query.float().unflatten(1, (key.shape[1], -1)).unsqueeze(4)  # [B, H, G, T, 1, D]
    low, high = low[:, :, None, None], high[:, :, None, None]
    scores = torch.maximum(grouped * low, grouped * high).sum(-1)
    return scores.repeat_interleave(page_size, -1)[..., :length].flatten(1, 2)
