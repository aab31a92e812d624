"""How fast is the sparse prefill of one layer, and how much of the true weight does it hold?

Keys and queries of a Llama-3.1-8B layer with planted structure: tokens come in topics that hold for
a few hundred tokens and return, and a query likes the keys of its topic, a few sinks and its
neighbours, as strongly as its head does; the rest is noise. So most of the weight lies in few
blocks, and which ones is known by computing it: the true mass is measured in full float32 attention
of sampled queries. Time of the choice alone, of the whole layer, and of SDPA in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.rows import reason, save, table
from bench.timing import queued, summary
from fierpatch import ops
from fierpatch.flex import Operands, PrefillSettings, Span, estimated_keys, sparse_attention
from fierpatch.flex.blocks import KEY_BLOCK, QUERY_BLOCK, candidate_blocks
from fierpatch.flex.prefill import chosen_spans
from fierpatch.index import RotatedIndex

COLUMNS = ["what", "context", "prefill_mass", "density", "mass", "mass_p5"]
COLUMNS += ["ms", "ms_p20", "ms_p80", "choose_ms", "choose_share", "speedup", "peak_mib"]
TOPICS = 64
TOPIC_TOKENS = 400  # that a topic holds for, on average
CALIBRATION_QUERIES = 256
MEASURED = 64  # queries whose true mass is measured, evenly spaced


@dataclass(frozen=True)
class Case:
    """One layer and its prompt."""

    context: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    device: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, but on a CPU, which is slow at it."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def main(arguments: list[str]) -> None:
    """Run the benchmark and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench flex_prefill", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--mass", type=float, nargs="+", default=[0.95, 0.96])
    parser.add_argument("--scores", nargs="+", choices=("index", "keys"), default=["index", "keys"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backend", choices=("triton", "reference"), help="triton on CUDA")
    parser.add_argument(
        "--any-length", action="store_true", help="keep the kernels of the context before"
    )
    parser.add_argument("--count", type=int, default=10, help="samples of each time")
    parser.add_argument("--output", type=Path, help="the file of rows")
    options = parser.parse_args(arguments)
    backend = options.backend or ("reference" if options.device == "cpu" else "triton")
    rows: list[dict[str, Any]] = []
    for context in options.context:
        if not options.any_length:
            torch._dynamo.reset()  # a kernel for this length, as that of a first prompt is
        case = Case(context, options.heads, options.kv_heads, options.head_dim, options.device)
        found = measure(case, options.mass, options.scores, backend, options.count)
        rows += [{**row, "any_length": options.any_length} for row in found]
        print(table([row for row in rows if row["context"] == context], COLUMNS), flush=True)
    print("saved", save("flex_prefill", options.device, rows, options.output))


def plant(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[1, Hq, S, D]``, keys and values ``[1, H, S, D]`` of a prompt with topics.

    The logit of a query and a key of its topic is by 3.5 to 9 above others', by head; of a sink by
    7.5; and of neighbours by up to 6, falling over some 100 tokens by an angle that both turn by.
    """
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    length, head_dim = case.context, case.head_dim
    num_segments = -(-length // TOPIC_TOKENS) + 1
    topics = torch.randint(TOPICS, (num_segments,), generator=generator, device=case.device)
    segment = torch.arange(length, device=case.device) // TOPIC_TOKENS
    topic = topics[segment]
    groups = case.num_heads // case.num_kv_heads
    shape = (case.num_kv_heads, length, head_dim)
    keys, values = normal(*shape), normal(*shape)
    # A direction a topic and KV head, of length 1; products of others with it are noise.
    directions = torch.nn.functional.normalize(normal(case.num_kv_heads, TOPICS, head_dim), dim=2)
    sink = torch.nn.functional.normalize(normal(case.num_kv_heads, 1, head_dim), dim=2)
    step = head_dim**0.25  # on both sides, so that the scale of the logits leaves its square
    keys *= 0.5
    keys += step * 2 * directions[:, topic]
    keys[:, :4] += 3 * step * sink
    # Two channels that turn, so that near positions agree.
    angle = torch.arange(length, device=case.device) / 100
    turn = torch.stack((angle.cos(), angle.sin()), 1)
    keys[..., :2] = step * turn
    query = normal(case.num_heads, length, head_dim) * 0.5
    strength = torch.linspace(1.75, 4.5, case.num_heads, device=case.device)[:, None, None]
    query += step * strength * directions.repeat_interleave(groups, 0)[:, topic]
    query += step * 2.5 * sink.repeat_interleave(groups, 0)
    query[..., :2] = step * 6 * turn
    return tuple(x[None].to(case.dtype) for x in (query, keys, values))  # type: ignore[return-value]


def measure(
    case: Case, masses: list[float], scores: list[str], backend: str, count: int
) -> list[dict[str, Any]]:
    """Rows of one prompt: the peers, then every mass by every kind of score."""
    query, keys, values = plant(case)
    scale = case.head_dim**-0.5
    operands = Operands(query, keys, values, scale)
    index = RotatedIndex(case.head_dim)
    sampled = query[:, :, :: max(case.context // CALIBRATION_QUERIES, 1)]
    state = ops.build_index(index, keys, query=sampled)
    shared = {
        "context": case.context,
        "heads": case.num_heads,
        "kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": backend,
    }
    rows: list[dict[str, Any]] = []
    for name, attend in peers(query, keys, values, case.device).items():
        row: dict[str, Any] = {"what": name, **shared}
        try:
            row |= timed(attend, case.device, count)
        except RuntimeError as error:  # which this machine does not have
            row["reason"] = reason(error)
        rows.append(row)
    best = min((row["ms"] for row in rows if "ms" in row), default=None)
    for what, mass in product(scores, masses):
        settings = PrefillSettings(mass, 1024, 4, 16)

        def estimate(what: str = what) -> Tensor:
            if what == "keys":
                return keys
            return estimated_keys(index, state, case.context, case.dtype)

        def choose(settings: PrefillSettings = settings, estimate: Any = estimate) -> list[Any]:
            return list(chosen_spans(operands, estimate(), settings, backend=backend))

        def attend(settings: PrefillSettings = settings, estimate: Any = estimate) -> Tensor:
            return sparse_attention(operands, estimate(), settings, backend=backend)

        row = {"what": f"sparse, by {what}", "prefill_mass": mass, **shared}
        row |= held(operands, choose())
        try:
            row |= timed(attend, case.device, count)
            row["choose_ms"] = timed(choose, case.device, count)["ms"]
            row["choose_share"] = row["choose_ms"] / row["ms"]
            row["speedup"] = best / row["ms"] if best else None
        except RuntimeError as error:
            row["reason"] = reason(error)
        rows.append(row)
    return rows


def peers(query: Tensor, keys: Tensor, values: Tensor, device: str) -> dict[str, Callable[[], Any]]:
    """Dense causal attention by every way that torch has."""
    attend = partial(
        scaled_dot_product_attention, query, keys, values, is_causal=True, enable_gqa=True
    )
    if device == "cpu":
        return {"SDPA": attend}

    def by(backend: SDPBackend) -> Callable[[], Any]:
        def attend_by_it() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return attend_by_it

    return {
        "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "SDPA FlashAttention": by(SDPBackend.FLASH_ATTENTION),
    }


def timed(function: Callable[[], Any], device: str, count: int) -> dict[str, float]:
    """Milliseconds of a call, one queued after another, and the memory that it takes."""
    function()
    before = 0
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    columns = summary(queued(function, device=device, count=count, warm_up=1), "ms")
    if device != "cpu":
        columns["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return columns


def held(operands: Operands, choices: list[tuple[Span, Tensor]]) -> dict[str, float]:
    """Density, and the true mass that the chosen blocks hold for `MEASURED` queries of all heads.

    A block past the diagonal is none, and the diagonal's own count by what is visible of them.
    """
    query, keys = operands.query, operands.keys
    length, groups = keys.shape[2], query.shape[1] // keys.shape[1]
    causal = total = 0.0
    masses = []
    token = torch.arange(length, device=query.device)
    rows = torch.linspace(0, length - 1, MEASURED).long().tolist()
    for span, chosen in choices:
        causal += chosen.shape[1] * float(candidate_blocks(span).sum())
        total += float(chosen.sum())
        for row in rows:
            if not span.rows.start <= row < span.rows.stop:
                continue
            wanted = query[:, :, row].float().unflatten(1, (-1, groups))
            logits = (wanted @ keys.float().mT).flatten(1, 2) * operands.scale  # [1, Hq, S]
            weights = logits.masked_fill(token > row, -torch.inf).softmax(-1)
            allowed = chosen[:, :, row // QUERY_BLOCK - span.first].repeat_interleave(KEY_BLOCK, 2)
            masses.append((weights * allowed[..., :length]).sum(-1).flatten())
    every = torch.cat(masses)
    low = every.kthvalue(max(len(every) // 20, 1)).values
    return {"density": total / causal, "mass": float(every.mean()), "mass_p5": float(low)}
