"""Attention over lists of tokens, and the whole way from new tokens to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch.index import RotatedIndex
from fierpatch.index.packing import TILE_SIZE
from kernels.steps import Retrieval, make_step
from kernels.tensors import GROUPS, HEAD_DIMS, LAYOUTS, guarded, lay_out
from states import assert_equal_states
from strategies import Shape, gaussian, seeds


@dataclass(frozen=True)
class Gather:
    """Attention over lists with empty slots anywhere."""

    shape: Shape
    width: int
    fill: float = 0.8  # the share of slots in use
    per_query_head: bool = False
    softcap: float = 0.0
    has_sink: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    has_counters: bool = True
    seed: int = 0


@st.composite
def gathers_like(draw: st.DrawFn, case: Gather) -> Gather:
    """Others that need the same compiled kernel: the widths here have as many splits."""
    length = draw(st.integers(1, case.shape.length))
    return replace(
        case,
        shape=replace(case.shape, length=length),
        width=draw(st.integers(case.width * 3 // 4 + 1, case.width)),
        fill=draw(st.sampled_from((0.0, 0.1, 0.8, 1.0))),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(seeds()),
    )


@st.composite
def gathers(
    draw: st.DrawFn,
    *,
    longest: int = 600,
    widths: tuple[int, ...] = (1, 5, 63, 64, 65, 130, 257),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16),
) -> Gather:
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    length = draw(st.integers(1, longest))
    shape = Shape(
        batch_size=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 2)),
        num_groups=draw(st.sampled_from((*GROUPS, 17))),
        num_queries=draw(st.integers(1, min(length, 2))),
        length=length,
        head_dim=head_dim,
        value_head_dim=draw(st.sampled_from((head_dim, 5, 48))),
    )
    return Gather(
        shape=shape,
        width=draw(st.sampled_from(widths)),
        fill=draw(st.sampled_from((0.0, 0.1, 0.8, 1.0))),
        per_query_head=shape.num_groups <= 4 and draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 0.0, 5.0, 50.0))),
        has_sink=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        has_counters=draw(st.booleans()),
        seed=draw(seeds()),
    )


def random_lists(case: Gather, generator: torch.Generator) -> Tensor:
    """Distinct positions in any order, in random slots; some rows without any."""
    axes = case.shape
    lists = axes.num_kv_heads * (axes.num_groups if case.per_query_head else 1)
    rows = axes.batch_size * lists * axes.num_queries
    token_indices = torch.full((rows, case.width), -1)
    for row in range(rows):
        num_used = min(round(case.fill * case.width), axes.length)
        if row % 5 == 4:
            num_used = 0
        slots = torch.randperm(case.width, generator=generator)[:num_used]
        tokens = torch.randperm(axes.length, generator=generator)[:num_used]
        token_indices[row, slots] = tokens
    return token_indices.view(axes.batch_size, lists, axes.num_queries, case.width)


def check_attention(
    found: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attended: oracles.BoolArray,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> None:
    """``found [B, Hq, T, Dv]`` errs no more than twice as eager attention in its dtype."""
    sink = None if sink_logits is None else oracles.exact(sink_logits)
    expected = oracles.attention(
        *(oracles.exact(x) for x in (query, keys, values)),
        attended,
        scale=scale,
        softcap=softcap,
        sink_logits=sink,
    )
    eager = oracles.eager_attention(
        query,
        keys,
        values,
        torch.from_numpy(attended),
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    eager = eager.masked_fill(~torch.from_numpy(attended).any(-1, keepdim=True), 0.0)
    error = np.abs(oracles.exact(found) - expected).max()
    assert error <= oracles.rounding_allowed(eager, expected)


def check_gather(case: Gather, device: torch.device) -> Tensor:
    """No further from float64 than eager attention may be, and blind to rows it was not given."""
    from fierpatch.kernels import append, attention

    axes, generator = case.shape, torch.Generator().manual_seed(case.seed)
    query = gaussian(axes.query, generator).to(case.dtype)
    keys = gaussian(axes.keys, generator).to(case.dtype)
    values = gaussian(axes.values, generator).to(case.dtype)
    num_heads = axes.query[1]
    sink_logits = torch.randn(num_heads, generator=generator) if case.has_sink else None
    token_indices = random_lists(case, generator)
    attended = oracles.attended_by(token_indices, num_heads, axes.length)
    is_read = torch.from_numpy(attended).unflatten(1, (axes.num_kv_heads, -1)).any(2).any(2)
    keys[~is_read] = torch.nan
    values[~is_read] = torch.nan
    scale = axes.head_dim**-0.5
    arrivals = torch.zeros(token_indices.shape[:3].numel(), dtype=torch.int32, device=device)
    counters = append.new_counters(device)
    counters[0] = axes.length
    found = attention.gather_attention(
        lay_out(query.to(device), case.layout),
        keys.to(device),
        values.to(device),
        token_indices.to(device),
        scale=scale,
        softcap=case.softcap,
        sink_logits=None if sink_logits is None else sink_logits.to(device),
        counters=counters if case.has_counters else None,
        arrivals=arrivals,
    )
    assert (arrivals == 0).all()
    assert found.dtype == query.dtype
    check_attention(
        found.cpu().transpose(1, 2), query, keys, values, attended, scale, case.softcap,
        sink_logits,
    )  # fmt: skip
    is_empty = ~torch.from_numpy(attended).any(-1)
    assert (found.cpu().transpose(1, 2)[is_empty] == 0).all()
    return found


def check_pipeline(case: Retrieval, device: torch.device) -> None:
    """Append, score, select and attend with room for every token: dense attention."""
    from fierpatch.kernels import append, attention

    axes = case.shape
    step = make_step(replace(case, budget=2**20), device)
    capacity = step.shape.tiles * TILE_SIZE
    lead = (axes.batch_size, axes.num_kv_heads)
    key_buffer = guarded((*lead, capacity, axes.head_dim), case.dtype, device)
    value_buffer = guarded((*lead, capacity, axes.value_head_dim), case.dtype, device)
    state = case.index.allocate(*lead, capacity, device)
    if isinstance(case.index, RotatedIndex):
        state[3].copy_(step.state[3])
    step.counters.zero_()
    prompt = axes.length - axes.num_queries
    for which, start, stop in ((None, 0, prompt), (case.index, prompt, axes.length)):
        key, value = (
            lay_out(x[:, :, start:stop].to(device), case.layout) for x in (step.keys, step.values)
        )
        append.append(
            which, key, value, key_buffer, value_buffer, [] if which is None else state,
            step.counters,
        )  # fmt: skip
    assert_equal_states([tensor.cpu() for tensor in state], step.state)
    step = replace(step, state=state)
    step.score()
    token_indices = step.select()
    arrivals = torch.zeros(step.shape.rows, dtype=torch.int32, device=device)
    found = attention.gather_attention(
        lay_out(step.query.to(device), case.layout),
        key_buffer,
        value_buffer,
        token_indices,
        scale=case.scale,
        softcap=case.softcap,
        sink_logits=None if step.sink_logits is None else step.sink_logits.to(device),
        counters=step.counters,
        arrivals=arrivals,
    )
    assert (arrivals == 0).all()
    attended = case.seen.expand(-1, axes.query[1], -1, -1).numpy()
    check_attention(
        found.cpu().transpose(1, 2), step.query, step.keys, step.values, attended, case.scale,
        case.softcap, step.sink_logits,
    )  # fmt: skip
