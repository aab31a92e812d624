"""What the kernels promise, checked on any device: Triton's interpreter and a GPU run this code.

Kernels are imported where they are called, because Triton decides on its first import whether it
interprets. Tolerances follow from what a kernel rounds; each says how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch import reference
from fierpatch.index import KeyIndex, RotatedIndex
from fierpatch.index.packing import TILE_SIZE, num_tiles
from fierpatch.select import causal_visible, to_logits
from oracles import FLOAT16_EPS, FLOAT16_STEP, FLOAT32_EPS
from states import assert_equal_states, held
from strategies import (
    TAME,
    WILD,
    Shape,
    channel_offsets,
    gaussian,
    group_sizes,
    heavy_tails,
    indexes,
    masks,
    seeds,
    ties,
)

LOG2_E = 1.4426950408889634
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 11)
LAYOUTS = ("contiguous", "transposed", "offset", "strided")
QUERY_LEVELS = 32512  # whole numbers that a channel of the rotated query may take
KEY_SHIFT = 14  # bits of a float32 priority that a selection key leaves out
ALWAYS = 65535  # the key of a sink or a recent
SMALLEST = 2.0**-126  # priorities below are all alike


def few(num_examples: int) -> Any:
    """`num_examples` in the profile `ci`, and as many more or fewer as other profiles have."""
    return settings(max_examples=max(1, settings.default.max_examples * num_examples // 100))


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, or at an address that no vector load may take."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "offset":
        flat = tensor.new_zeros(tensor.numel() + 1)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    if layout == "strided":
        return torch.stack((tensor, tensor), dim=-1)[..., 0]
    return tensor


def words(tensor: Tensor) -> Tensor:
    """The bits of floats, so that NaN equals NaN."""
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN of that shape with 4096 more behind it: see `is_intact`."""
    flat = torch.full((math.prod(shape) + 4096,), torch.nan, dtype=dtype, device=device)
    return flat[:-4096].view(shape)


def is_intact(buffer: Tensor, num_written: int) -> bool:
    """Whether rows past `num_written`, and what lies behind the buffer, are as `guarded` made."""
    flat = buffer._base
    assert flat is not None
    return bool(buffer[:, :, num_written:].isnan().all() and flat[-4096:].isnan().all())


def set_balance(index: KeyIndex, state: list[Tensor], generator: torch.Generator) -> None:
    if isinstance(index, RotatedIndex):
        state[3].copy_(torch.randn(state[3].shape, generator=generator).exp())


@dataclass(frozen=True)
class Feed:
    """Tokens that reach a layer: a prompt, of which `indexed` are indexed at once, then pieces."""

    index: KeyIndex
    prompt: int
    indexed: int
    pieces: tuple[int, ...]
    batch_size: int = 1
    num_kv_heads: int = 1
    value_head_dim: int = 16
    room: int = 3  # rows of the buffer past the last token, or where negative, rows it lacks
    kind: Callable[..., Tensor] = gaussian
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    @property
    def length(self) -> int:
        return self.prompt + sum(self.pieces)


# Just before, on and after the ends of planes, groups and tiles.
EDGES = (0, 1, 30, 32, 63, 127, 128, 250, 256, 383, 507, 511, 512, 513, 600)


@st.composite
def feeds(
    draw: st.DrawFn,
    *,
    longest: int = 600,
    longest_piece: int = 8,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16),
    heads: int = 2,
) -> Feed:
    index = draw(indexes(head_dims=HEAD_DIMS))
    prompt = draw(st.sampled_from(EDGES) | st.integers(0, longest))
    how = draw(st.sampled_from(("all", "all", "none", "some")))
    indexed = {"all": prompt, "none": 0, "some": draw(st.integers(0, prompt))}[how]
    pieces = draw(st.lists(st.integers(1, longest_piece), min_size=1, max_size=4))
    return Feed(
        index=index,
        prompt=prompt,
        indexed=indexed,
        pieces=tuple(pieces),
        batch_size=draw(st.integers(1, heads)),
        num_kv_heads=draw(st.integers(1, heads)),
        value_head_dim=draw(st.sampled_from((index.head_dim, 5, 48))),
        room=draw(st.sampled_from((0, 3, 700))),
        kind=draw(st.sampled_from((*TAME, *WILD))),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(seeds()),
    )


def check_append(feed: Feed, device: torch.device) -> None:
    """State, buffers and counters are those of the reference, to the bit."""
    from fierpatch.kernels import append

    index, length = feed.index, feed.length
    capacity = max(length + feed.room, 1)
    stored = min(length, capacity)
    generator = torch.Generator().manual_seed(feed.seed)
    lead = (feed.batch_size, feed.num_kv_heads)
    keys = feed.kind((*lead, length, index.head_dim), generator).to(feed.dtype)
    values = feed.kind((*lead, length, feed.value_head_dim), generator).to(feed.dtype)
    expected = index.allocate(*lead, capacity, keys.device)
    set_balance(index, expected, generator)
    state = [tensor.to(device, copy=True) for tensor in expected]
    index.append(expected, keys, 0, stored)

    key_buffer = guarded((*lead, capacity, index.head_dim), feed.dtype, device)
    value_buffer = guarded((*lead, capacity, feed.value_head_dim), feed.dtype, device)
    counters = append.new_counters(device)

    def feed_tokens(which: KeyIndex | None, start: int, stop: int) -> None:
        key, value = (
            lay_out(x[:, :, start:stop].to(device), feed.layout) for x in (keys, values)
        )
        own = [] if which is None else state
        append.append(which, key, value, key_buffer, value_buffer, own, counters)

    if feed.prompt:
        feed_tokens(None, 0, feed.prompt)
        assert counters.tolist() == [feed.prompt, 0, 0, 0]
    half = feed.indexed // 2
    append.index_range(index, key_buffer, state, 0, half)
    append.index_range(index, key_buffer, state, half, feed.indexed)
    counters[1] = feed.indexed
    start = feed.prompt
    for piece in feed.pieces:
        feed_tokens(index, start, start + piece)
        start += piece
        assert counters.tolist() == [start, start, 0, 0]
    for buffer, tokens in ((key_buffer, keys), (value_buffer, values)):
        assert torch.equal(words(buffer[:, :, :stored].cpu()), words(tokens[:, :, :stored]))
        assert is_intact(buffer, stored)
    assert_equal_states([tensor.cpu() for tensor in state], expected)


@dataclass(frozen=True, repr=False)
class Retrieval:
    """A step of retrieval: an index full of keys, queries, and how to choose."""

    index: KeyIndex
    shape: Shape
    budget: int = 64
    sinks: int = 0
    recent: int = 1
    per_query_head: bool = False
    softcap: float = 0.0
    has_sink: bool = False
    visible: Tensor | None = None  # broadcastable to [B, 1, T, S]
    kind: Callable[..., Tensor] = gaussian
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    room: int = 0  # tiles of the index past those of the tokens
    block: int = 512
    seed: int = 0

    def __repr__(self) -> str:
        """What was drawn, not the numbers of the mask."""
        mask = None if self.visible is None else tuple(self.visible.shape)
        rest = {name: x for name, x in vars(self).items() if name != "visible"}
        return f"Retrieval({rest}, visible={mask})"

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def seen(self) -> Tensor:
        """What each query sees: bool ``[B, 1, T, S]``."""
        axes, cpu = self.shape, torch.device("cpu")
        visible = self.visible
        if visible is None:
            visible = causal_visible(axes.num_queries, axes.length, cpu)
        return visible.expand(axes.batch_size, 1, axes.num_queries, axes.length)


@st.composite
def retrievals(
    draw: st.DrawFn,
    *,
    longest: int = 1100,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16),
    most_rows: int = 8,
    block: int = 512,
) -> Retrieval:
    """Steps of up to `most_rows` rows, a KV head and query each."""
    index = draw(indexes(head_dims=HEAD_DIMS))
    length = draw(st.sampled_from((1, 2, 31, 33, 129, 511, 512, 513, 640, 1025)))
    length = draw(st.just(length) | st.integers(1, longest))
    num_queries = draw(st.integers(1, min(8, length, most_rows)))
    batch_size = draw(st.integers(1, min(2, most_rows // num_queries)))
    heads = draw(st.integers(1, min(2, most_rows // num_queries // batch_size)))
    shape = Shape(
        batch_size=batch_size,
        num_kv_heads=heads,
        num_groups=draw(st.sampled_from(GROUPS)),
        num_queries=num_queries,
        length=length,
        head_dim=index.head_dim,
        value_head_dim=draw(st.sampled_from((index.head_dim, 5, 48))),
    )
    sinks, recent = draw(st.sampled_from(((0, 0), (0, 1), (4, 16), (1, 40))))
    budget = draw(st.sampled_from((1, 2, 33, 64, 256, 2000)) | st.integers(1, 300))
    return Retrieval(
        index=index,
        shape=shape,
        budget=max(budget, sinks + recent),
        sinks=sinks,
        recent=recent,
        per_query_head=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 0.0, 20.0))),
        has_sink=draw(st.booleans()),
        visible=draw(masks(batch_size, num_queries, length)),
        kind=draw(st.sampled_from((gaussian, channel_offsets, heavy_tails, ties))),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        room=draw(st.integers(0, 2)),
        block=block,
        seed=draw(seeds()),
    )


@dataclass(frozen=True)
class Step:
    """A `Retrieval` with its tensors, those of the kernels on the device."""

    case: Retrieval
    shape: Any
    scratch: Any
    counters: Tensor
    arrivals: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    state: list[Tensor]
    sink_logits: Tensor | None
    device: torch.device

    def score(self) -> None:
        from fierpatch.kernels import retrieve

        case = self.case
        axes = case.shape
        visible = case.visible
        if visible is not None:
            sizes = (visible.shape[0], 1, axes.num_queries, axes.length)
            visible = visible.to(self.device).expand(sizes)
        retrieve.score(
            self.shape,
            self.scratch,
            lay_out(self.query.to(self.device), case.layout),
            [tensor.to(self.device) for tensor in self.state],
            self.counters,
            retrieve.Logits(case.scale, case.softcap),
            visible,
        )

    def select(self) -> Tensor:
        from fierpatch.kernels import retrieve

        case = self.case
        sink = None if self.sink_logits is None else self.sink_logits.to(self.device)
        chosen = retrieve.select(
            self.shape,
            self.scratch,
            self.counters,
            self.arrivals,
            sinks=case.sinks,
            recent=case.recent,
            sink_logits=sink,
            has_mask=case.visible is not None,
        )
        assert (self.arrivals == 0).all()
        return chosen

    def logits(self) -> Tensor:
        """What `score` left: float64 ``[B, H, T, S, G]`` on the CPU, in units of log2."""
        axes = self.case.shape
        sizes = (axes.batch_size, axes.num_kv_heads, axes.num_queries, -1, axes.num_groups)
        return self.scratch.logit.view(sizes)[:, :, :, : axes.length].cpu().double()


def make_step(case: Retrieval, device: torch.device) -> Step:
    from fierpatch.kernels import append, retrieve

    axes, generator = case.shape, torch.Generator().manual_seed(case.seed)
    tiles = num_tiles(axes.length) + case.room
    keys = case.kind(axes.keys, generator).to(case.dtype)
    state = case.index.allocate(*axes.keys[:2], tiles * TILE_SIZE, keys.device)
    set_balance(case.index, state, generator)
    case.index.append(state, keys, 0, axes.length)
    num_heads = axes.query[1]
    shape = retrieve.Shape(
        case.index, axes.batch_size, axes.num_kv_heads, axes.num_groups, axes.num_queries,
        tiles, case.budget, case.per_query_head, case.block,
    )  # fmt: skip
    counters = append.new_counters(device)
    counters[:2] = axes.length
    return Step(
        case=case,
        shape=shape,
        scratch=retrieve.Scratch(shape, device),
        counters=counters,
        arrivals=torch.zeros(shape.rows, dtype=torch.int32, device=device),
        query=gaussian(axes.query, generator).to(case.dtype),
        keys=keys,
        values=gaussian(axes.values, generator).to(case.dtype),
        state=state,
        sink_logits=torch.randn(num_heads, generator=generator) if case.has_sink else None,
        device=device,
    )


def exact_scores(step: Step) -> tuple[Tensor, Tensor]:
    """The index's estimate in float64, and the error that a kernel may make: ``[B, H, T, S, G]``.

    A sum of D float32 products is off by up to ``2 (D + 8)`` roundings of the sum of their sizes:
    a matrix unit cuts off where a CPU rounds, and splits a float32 into parts with 22 bits.
    """
    index, axes = step.case.index, step.case.shape
    parts = {name: x.double() for name, x in held(index, step.state, axes.length).items()}
    query = step.query.double().unflatten(1, (axes.num_kv_heads, -1)).transpose(2, 3)
    summed = 2 * (axes.head_dim + 8) * FLOAT32_EPS

    def dot(left: Tensor, right: Tensor) -> Tensor:
        """``[B, H, T, G, D] . [B, H, S, D]``: ``[B, H, T, S, G]``."""
        return torch.einsum("bhtgd,bhsd->bhtsg", left, right)

    def by_token(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(index.group_size, 2)[:, :, : axes.length]

    bits = 2 * parts["bits"] - 1  # [B, H, S, bits, D]
    if isinstance(index, RotatedIndex):
        levels = bits[:, :, :, 0] if index.bits == 1 else 2 * bits[:, :, :, 0] + bits[:, :, :, 1]
        matrix = torch.from_numpy(oracles.rotation(index.head_dim, index.seed))
        rotated = query / parts["balance"][:, :, None, None] @ matrix
        centre = by_token(parts["centre"])
        scale = parts["scale"][:, :, None, :, None]
        scores = scale * dot(rotated, levels) + dot(query, centre)
        norm = rotated.norm(dim=-1)[:, :, :, None]  # [B, H, T, 1, G]
        # Each channel is rounded to a multiple of norm / 32512, after a float32 rotation of norm.
        channel = norm / (2 * QUERY_LEVELS) + summed * norm
        sizes = levels.abs().sum(-1)[:, :, None, :, None]
        # Then whole numbers up to |levels| |rotated| turn into float32 and are multiplied.
        rounded = 10 * FLOAT32_EPS * levels.abs().amax() * math.sqrt(axes.head_dim) * norm
        error = scale * (sizes * channel + rounded)
        centre_norm = centre.norm(dim=-1)[:, :, None, :, None]
        error += summed * query.norm(dim=-1)[:, :, :, None] * centre_norm
    else:
        signs = bits[:, :, :, 0]
        is_set = (signs > 0).double()
        scale, zero = by_token(parts["scale"]), by_token(parts["zero"])
        scores = dot(query, zero + signs * scale)
        peak = query.abs().amax(-1, keepdim=True)
        ratio = (query / peak.clamp_min(1e-300)).abs()
        # The query over its peak becomes float16, and so does its product with the group's scale.
        rounding = ratio * (FLOAT16_EPS + FLOAT32_EPS) + FLOAT16_STEP
        larger = ratio + rounding
        error = dot(rounding, (zero + signs * scale).abs())
        error += 2 * FLOAT16_EPS * dot(larger, is_set * scale)
        error += 2 * FLOAT16_STEP * is_set.sum(-1)[:, :, None, :, None]
        error += summed * dot(larger, zero.abs() + 3 * scale)
        error *= peak.squeeze(-1)[:, :, :, None]
    return scores, error + 4 * FLOAT32_EPS * scores.abs()


def exact_logits(step: Step) -> tuple[Tensor, Tensor]:
    """`exact_scores` as logits in units of log2; tanh makes no error larger."""
    case = step.case
    scores, error = exact_scores(step)
    logits = to_logits(scores, case.scale, case.softcap) * LOG2_E
    error = error * case.scale * LOG2_E + 8 * FLOAT32_EPS * logits.abs()
    return logits, error + 8 * FLOAT32_EPS * case.softcap * LOG2_E


def check_scores(case: Retrieval, device: torch.device) -> None:
    """Logits within what the kernel rounds, and softmax statistics that are those of the logits."""
    step = make_step(case, device)
    step.score()
    axes, found = case.shape, step.logits()
    expected, allowed = exact_logits(step)
    seen = case.seen.unsqueeze(4).expand_as(found)  # [B, H, T, S, G]
    assert (found[~seen] == -torch.inf).all()
    assert ((found - expected).abs() <= allowed)[seen].all()

    tiles = num_tiles(axes.length)
    ends = (0, 0, 0, tiles * TILE_SIZE - axes.length)
    by_tile = torch.nn.functional.pad(found, ends, value=-torch.inf).unflatten(3, (tiles, -1))
    sizes = (axes.batch_size, axes.num_kv_heads, axes.num_queries, -1, axes.num_groups)
    most, total = (
        x.view(sizes)[:, :, :, :tiles].cpu().double()
        for x in (step.scratch.most, step.scratch.sum)
    )
    largest = by_tile.amax(4)
    assert torch.equal(most, largest)
    weights = torch.exp2(by_tile - largest.nan_to_num(neginf=0.0).unsqueeze(4)).sum(4)
    # 512 additions, and up to 17 changes of the reference by an exp2 of 4 roundings.
    assert ((total - weights).abs() <= (512 + 17 * 5) * FLOAT32_EPS * weights).all()
    if case.visible is not None:
        visible = torch.nn.functional.pad(case.seen[:, 0], (0, ends[3]))
        counts = visible.unflatten(2, (tiles, -1)).sum(3)
        assert torch.equal(step.scratch.count[:, :, :tiles].cpu(), counts.int())


def check_agreement(case: Retrieval, device: torch.device) -> None:
    """The reference's tokens, but for those that rounding makes equal to the last one chosen."""
    step = make_step(case, device)
    step.score()
    found = step.select().cpu()
    axes = case.shape
    expected = reference.select_from_index(
        case.index,
        step.state,
        step.query,
        axes.length,
        budget=case.budget,
        sinks=case.sinks,
        recent=case.recent,
        per_query_head=case.per_query_head,
        scale=case.scale,
        softcap=case.softcap,
        sink_logits=step.sink_logits,
        visible=case.seen,
    )
    assert_well_formed(found)
    assert found.shape[:3] == expected.shape[:3]
    num_chosen = (found >= 0).sum(-1)
    assert torch.equal(num_chosen, (expected >= 0).sum(-1))
    logits, error = exact_logits(step)
    allowed = error.masked_fill(~case.seen.unsqueeze(4), 0.0).amax().item()
    priorities = exact_priorities(step, logits)
    # A logit and its log-sum are off by `allowed` each, for the one token as for the other.
    margin = 4 * allowed + math.log2(1 + 2.0**-9)
    for place in np.ndindex(found.shape[:3]):
        ours, theirs = (set(lists[place].tolist()) for lists in (found, expected))
        missed, taken = theirs - ours - {-1}, ours - theirs - {-1}
        if missed:
            priority = priorities[place].clamp_min(SMALLEST).log2()
            assert priority[list(missed)].max() <= priority[list(taken)].min() + margin


def assert_well_formed(token_indices: Tensor) -> None:
    """Ascending positions, each once, then -1."""
    is_used = token_indices >= 0
    follows = token_indices[..., 1:] > token_indices[..., :-1]
    assert (follows | ~is_used[..., 1:]).all()
    assert (token_indices[~is_used] == -1).all()


def log_sums(step: Step, logits: Tensor) -> Tensor:
    """Each head's log2-sum-exp2 beside its sink: ``[B, H, T, G]``, 0 where nothing is seen."""
    seen = step.case.seen.unsqueeze(4)
    log2 = logits.masked_fill(~seen, -torch.inf) / LOG2_E
    if step.sink_logits is not None:
        sink = step.sink_logits.double().view(1, log2.shape[1], 1, 1, -1)
        log2 = torch.cat((log2, sink.expand(*log2.shape[:3], 1, -1)), dim=3)
    return (log2.logsumexp(3) * LOG2_E).nan_to_num(neginf=0.0)


def exact_priorities(step: Step, logits: Tensor) -> Tensor:
    """What a list ranks tokens by, float64 ``[B, H or Hq, T, S]``; 0 where invisible."""
    logits = logits.masked_fill(~step.case.seen.unsqueeze(4), -torch.inf)
    weights = torch.exp2(logits - log_sums(step, logits).unsqueeze(3))
    if step.case.per_query_head:
        return weights.permute(0, 1, 4, 2, 3).flatten(1, 2)
    return weights.mean(4)


@contextmanager
def chunks_at_most(num_chunks: int) -> Iterator[None]:
    """Let a selection have so few programs a row that each reads several blocks."""
    from fierpatch.kernels import retrieve

    def clear() -> None:
        for value in vars(retrieve).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    before = retrieve._MAX_CHUNKS
    clear()
    retrieve._MAX_CHUNKS = num_chunks
    try:
        yield
    finally:
        retrieve._MAX_CHUNKS = before
        clear()


def gentle(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 3 * torch.randn(shape, generator=generator)


def wide(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Most weights are below what float32 holds."""
    return 200 * torch.randn(shape, generator=generator)


def level(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.full(shape, 7.0)


def peaked(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One token in a hundred is far above the rest, which are equal."""
    return 40.0 * (torch.rand(shape, generator=generator) < 0.01)


LOGITS = (gentle, heavy_tails, ties, wide, level, peaked)


def inject(step: Step, logits: Tensor) -> Tensor:
    """Have the scratch hold ``logits [B, H, T, S, G]`` as if `score` had left them.

    Returns the logits with -inf where invisible.
    """
    axes, scratch = step.case.shape, step.scratch
    logits = logits.float().masked_fill(~step.case.seen.unsqueeze(4), -torch.inf)
    tiles = num_tiles(axes.length)
    pad = tiles * TILE_SIZE - axes.length
    padded = torch.nn.functional.pad(logits, (0, 0, 0, pad), value=-torch.inf).flatten(0, 2)
    scratch.logit[:, : tiles * TILE_SIZE] = padded.to(step.device)
    by_tile = padded.double().unflatten(1, (tiles, -1))
    most = by_tile.amax(2)
    total = torch.exp2(by_tile - most.nan_to_num(neginf=0.0).unsqueeze(2)).sum(2)
    scratch.most[:, :tiles] = most.float().to(step.device)
    scratch.sum[:, :tiles] = total.float().to(step.device)
    if step.case.visible is not None:
        seen = torch.nn.functional.pad(step.case.seen[:, 0], (0, pad))
        scratch.count[:, :, :tiles] = seen.unflatten(2, (tiles, -1)).sum(3).int().to(step.device)
    return logits


def key_bounds(step: Step, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest key that rounding may give each token: ``[B, H or Hq, T, S]``."""
    case, axes = step.case, step.case.shape
    logits = logits.double()
    sums = log_sums(step, logits).unsqueeze(3)  # [B, H, T, 1, G]
    # A sum over tiles, an exp2 and a log2 of 4 roundings each, and float32's hold on the result.
    sum_error = 1.5 * (num_tiles(axes.length) + 16) + 2 * sums.abs()
    distance = (logits - sums).abs().nan_to_num(posinf=0.0)
    relative = math.log(2) * (sum_error + distance) + 4 + axes.num_groups + 2
    relative = relative * FLOAT32_EPS
    if case.per_query_head:
        error = relative.permute(0, 1, 4, 2, 3).flatten(1, 2)
    else:
        # A sum of positive terms is off by no more than the worst of those that matter.
        error = relative.masked_fill(logits - sums < -150, 0.0).amax(4)
    priority = exact_priorities(step, logits)

    def key_of(x: Tensor) -> Tensor:
        bits = x.clamp_min(0.0).float().view(torch.int32)
        return (bits >> KEY_SHIFT).clamp(1, ALWAYS - 1)

    tiny = axes.num_groups * SMALLEST
    least, largest = key_of(priority * (1 - error) - tiny), key_of(priority * (1 + error) + 2e-42)
    seen = case.seen.expand_as(priority)
    rank = seen.cumsum(-1)
    is_kept = (rank <= case.sinks) | (rank > rank[..., -1:] - case.recent)
    return tuple(
        key.masked_fill(is_kept, ALWAYS).masked_fill(~seen, 0) for key in (least, largest)
    )  # type: ignore[return-value]


def check_chosen(step: Step, found: Tensor, logits: Tensor) -> None:
    """Exactly the largest keys, ties to the lowest position, ascending, -1 behind.

    Where rounding leaves two keys open for a token, the list has to suit one of them.
    """
    case = step.case
    assert found.shape[-1] == min(case.budget, step.shape.tiles * TILE_SIZE)
    assert_well_formed(found)
    least, largest = key_bounds(step, logits)
    assert found.shape[:3] == least.shape[:3]
    for place in np.ndindex(found.shape[:3]):
        chosen = found[place][found[place] >= 0]
        low, high = least[place], largest[place]
        is_seen = low > 0
        assert is_seen[chosen].all()
        assert len(chosen) == min(case.budget, int(is_seen.sum()))
        is_left = is_seen.clone()
        is_left[chosen] = False
        if len(chosen) and is_left.any():
            left = is_left.nonzero()[:, 0]
            worst, best = high[chosen].min(), low[left].max()
            assert worst >= best
            if worst == best:
                assert chosen[high[chosen] == worst].max() < left[low[left] == best].min()


@dataclass(frozen=True)
class Choice:
    """Logits of a kind, and into how many chunks their rows are cut at most."""

    case: Retrieval
    logits: Callable[..., Tensor]
    max_chunks: int = 64


@st.composite
def choices(draw: st.DrawFn, *, longest: int = 2500, block: int = 512) -> Choice:
    case = draw(retrievals(longest=longest, most_rows=4, block=block))
    index = replace(case.index, head_dim=8)  # nothing reads it
    axes = replace(case.shape, head_dim=8, value_head_dim=8)
    case = replace(case, index=index, shape=axes, softcap=0.0)
    return Choice(case, draw(st.sampled_from(LOGITS)), draw(st.sampled_from((1, 2, 3, 64))))


def check_choice(choice: Choice, device: torch.device) -> None:
    """Twice with one scratch, on rows of two lengths: nothing of the first is left in the second."""
    with chunks_at_most(choice.max_chunks):
        step = make_step(choice.case, device)
        axes = choice.case.shape
        generator = torch.Generator().manual_seed(choice.case.seed)
        lengths = {axes.length, max(axes.length * 2 // 3, axes.num_queries)}
        for length in sorted(lengths, reverse=True):
            visible = choice.case.visible
            if visible is not None and visible.shape[3] > 1:
                visible = visible[..., :length]
            shorter = replace(axes, length=length)
            step = replace(step, case=replace(choice.case, shape=shorter, visible=visible))
            step.counters[:2] = length
            lead = (axes.batch_size, axes.num_kv_heads, axes.num_queries, length)
            logits = inject(step, choice.logits((*lead, axes.num_groups), generator))
            check_chosen(step, step.select().cpu(), logits)


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
        softcap=draw(st.sampled_from((0.0, 0.0, 5.0))),
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
    found = attention.gather_attention(
        lay_out(step.query.to(device), case.layout),
        key_buffer,
        value_buffer,
        token_indices,
        scale=case.scale,
        softcap=case.softcap,
        sink_logits=None if step.sink_logits is None else step.sink_logits.to(device),
        counters=step.counters,
        arrivals=step.arrivals,
    )
    attended = case.seen.expand(-1, axes.query[1], -1, -1).numpy()
    check_attention(
        found.cpu().transpose(1, 2), step.query, step.keys, step.values, attended, case.scale,
        case.softcap, step.sink_logits,
    )  # fmt: skip
