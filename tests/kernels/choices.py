"""Which tokens a kernel has to choose, given logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fierpatch import reference
from fierpatch.index.packing import TILE_SIZE, num_tiles
from fierpatch.select import select
from kernels.scores import by_tile, exact_logits, exact_priorities, half_bits, log_sums
from kernels.steps import Build, Retrieval, Step, make_step, retrievals
from oracles import FLOAT32_EPS
from strategies import heavy_tails, ties

FLUSHED = 2.0**-126  # weights below may be zero


@dataclass(frozen=True)
class Grid:
    """How far a selection tells priorities apart.

    Its keys are the bits of a float32 from `shift` on, counted from those of the smallest.
    """

    shift: int
    always: int  # the key of a sink or a recent
    smallest: float  # priorities below are all alike

    def keys_of(self, priority: Tensor) -> Tensor:
        bits = priority.clamp_min(0.0).float().view(torch.int32)
        first = torch.tensor(self.smallest).view(torch.int32) >> self.shift
        return ((bits >> self.shift) - first).clamp(1, self.always - 1)

    @property
    def step(self) -> float:
        """By how much two priorities of one key may differ, in octaves."""
        return math.log2(1 + 2.0 ** (self.shift - 23))


EXACT = Grid(15, (1 << 14) - 1, 2.0**-63)


def coarse(count: int) -> Grid:
    """61 quarters of an octave, of which the last is that of 1 / count: all above are chosen."""
    bits = torch.tensor(1 / max(count, 1)).view(torch.int32) >> 21
    return Grid(21, 63, ((bits - 61) << 21).view(torch.float32).item())


def first_grid(case: Retrieval) -> Grid:
    """Of the selection from all tokens."""
    return coarse(case.first_budget - case.sinks - case.recent) if case.refine else EXACT


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


def lopsided(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The first third is equal, and about half of the rest, far apart, is above it."""
    logits = 15 * torch.randn(shape, generator=generator)
    logits[..., : shape[-2] // 3, :] = 0.0
    return logits


LOGITS = (gentle, heavy_tails, ties, wide, level, peaked, lopsided)


@dataclass(frozen=True)
class Choice:
    """Logits of a kind, and into how many chunks their rows are cut at most."""

    case: Retrieval
    logits: Callable[..., Tensor]
    max_chunks: int = 64


@st.composite
def choices(
    draw: st.DrawFn,
    *,
    builds: st.SearchStrategy[Build] | None = None,
    longest: int = 2500,
    most_rows: int = 2,
    block: int = 512,
) -> Choice:
    drawn = retrievals(builds=builds, longest=longest, most_rows=most_rows, block=block)
    case = draw(drawn)
    index = replace(case.index, head_dim=8)  # nothing reads it
    axes = replace(case.shape, head_dim=8, value_head_dim=8)
    case = replace(case, index=index, shape=axes, softcap=0.0)
    return Choice(case, draw(st.sampled_from(LOGITS)), draw(st.sampled_from((1, 2, 3, 64))))


@contextmanager
def chunks_at_most(num_chunks: int) -> Iterator[None]:
    """Let a selection have so few programs a row that each reads several blocks."""
    from fierpatch.kernels import retrieval_kernels, shape

    def clear() -> None:
        for value in vars(retrieval_kernels).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    before = shape._MAX_CHUNKS
    clear()
    shape._MAX_CHUNKS = num_chunks
    try:
        yield
    finally:
        shape._MAX_CHUNKS = before
        clear()


def inject(step: Step, logits: Tensor) -> Tensor:
    """Have the scratch hold ``logits [B, H, T, S, G]`` as if `score` had left them.

    All but the zeros in `high`, which a selection leaves too. Returns the logits that it holds,
    rounded to 16 bits of weight, with -inf where invisible.
    """
    axes, scratch = step.case.shape, step.scratch
    seen = step.case.seen.unsqueeze(4)
    tiles = num_tiles(axes.length)
    padded = by_tile(logits.float().double().masked_fill(~seen, -torch.inf), -torch.inf)
    most = padded.amax(4, keepdim=True)
    weights = torch.exp2(padded - most.nan_to_num(neginf=0.0))
    bits = half_bits(weights).masked_fill(padded == -torch.inf, 0)
    held = (bits << 15).view(torch.float32).double()
    flat = bits.to(torch.int16).flatten(3, 4).flatten(0, 2)
    scratch.weight[:, : tiles * TILE_SIZE] = flat.to(step.device)
    scratch.most[:, :tiles] = most.squeeze(4).flatten(0, 2).float().to(step.device)
    scratch.sum[:, :tiles] = held.sum(4).flatten(0, 2).float().to(step.device)
    if step.case.visible is not None:
        counts = by_tile(seen[..., :1].expand(-1, 1, -1, -1, 1), 0).sum(4)[:, 0, :, :, 0]
        scratch.count[:, :, :tiles] = counts.int().to(step.device)
    rounded = most + held.log2()
    return rounded.flatten(3, 4)[:, :, :, : axes.length].masked_fill(~seen, -torch.inf)


def key_bounds(
    step: Step, logits: Tensor, grid: Grid, rounding: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The least and the largest key that rounding may give each token: ``[B, H or Hq, T, S]``.

    Args:
        rounding: relative error of the sum of the weights that the logits stand for.
    """
    case, axes = step.case, step.case.shape
    logits = logits.double()
    sums = log_sums(step, logits).unsqueeze(3)  # [B, H, T, 1, G]
    # A sum over tiles, an exp2 and a log2 of 4 roundings each, and float32's hold on the result.
    sum_error = 1.5 * (num_tiles(axes.length) + 16) + 2 * sums.abs()
    distance = (logits - sums).abs().nan_to_num(posinf=0.0)
    relative = math.log(2) * (sum_error + distance) + 4 + axes.num_groups + 2
    relative = relative * FLOAT32_EPS + rounding
    if case.per_query_head:
        error = relative.permute(0, 1, 4, 2, 3).flatten(1, 2)
    else:
        # A sum of positive terms is off by no more than the worst of those that matter.
        error = relative.masked_fill(logits - sums < -150, 0.0).amax(4)
    priority = exact_priorities(step, logits)

    tiny = axes.num_groups * FLUSHED
    least = grid.keys_of(priority * (1 - error) - tiny)
    largest = grid.keys_of(priority * (1 + error) + 2e-42)
    seen = case.seen.expand_as(priority)
    rank = seen.cumsum(-1)
    is_kept = (rank <= case.sinks) | (rank > rank[..., -1:] - case.recent)
    least, largest = (
        key.masked_fill(is_kept, grid.always).masked_fill(~seen, 0) for key in (least, largest)
    )
    return least, largest


def assert_well_formed(token_indices: Tensor) -> None:
    """Ascending positions, each once, then -1."""
    is_used = token_indices >= 0
    follows = token_indices[..., 1:] > token_indices[..., :-1]
    assert (follows | ~is_used[..., 1:]).all()
    assert (token_indices[~is_used] == -1).all()


def check_chosen(
    step: Step, found: Tensor, logits: Tensor, grid: Grid | None = None, rounding: float = 0.0
) -> None:
    """Exactly the largest keys, ties to the lowest position, ascending, -1 behind.

    Where rounding leaves two keys open for a token, the list has to suit one of them.
    """
    case = step.case
    budget = case.first_budget
    assert found.shape[-1] == min(budget, step.shape.tiles * TILE_SIZE)
    assert_well_formed(found)
    least, largest = key_bounds(step, logits, grid or first_grid(case), rounding)
    assert found.shape[:3] == least.shape[:3]
    for place in np.ndindex(found.shape[:3]):
        chosen = found[place][found[place] >= 0]
        low, high = least[place], largest[place]
        is_seen = low > 0
        assert is_seen[chosen].all()
        assert len(chosen) == min(budget, int(is_seen.sum()))
        is_left = is_seen.clone()
        is_left[chosen] = False
        if len(chosen) and is_left.any():
            left = is_left.nonzero()[:, 0]
            worst, best = high[chosen].min(), low[left].max()
            assert worst >= best
            if worst == best:
                assert chosen[high[chosen] == worst].max() < left[low[left] == best].min()


def check_choice(choice: Choice, device: torch.device) -> None:
    """Twice with one scratch, on rows of two lengths: nothing is left of the first."""
    with chunks_at_most(choice.max_chunks):
        step = make_step(choice.case, device, is_indexed=False)
        axes = choice.case.shape
        generator = torch.Generator().manual_seed(choice.case.seed)
        lengths = {axes.length, max(axes.length * 2 // 3, axes.num_queries)}
        step.scratch.high.zero_()
        for length in sorted(lengths, reverse=True):
            visible = choice.case.visible
            if visible is not None and visible.shape[3] > 1:
                visible = visible[..., :length]
            shorter = replace(axes, length=length)
            step = replace(step, case=replace(choice.case, shape=shorter, visible=visible))
            step.counters[:2] = length
            lead = (axes.batch_size, axes.num_kv_heads, axes.num_queries, length)
            logits = inject(step, choice.logits((*lead, axes.num_groups), generator))
            found = step.select()
            check_chosen(step, found.cpu(), logits)
            assert (step.scratch.high == 0).all()
            assert torch.equal(step.select(), found)


def check_interruption(case: Retrieval, device: torch.device) -> None:
    """Whatever an interrupted step left of its tallies, the next one chooses what it would have."""
    step = make_step(case, device)
    step.score()
    expected = step.select()
    for name in ("high", "chunk_low", "chunk_over", "plan"):
        getattr(step.scratch, name).fill_(12345)
    step.score()
    assert (step.scratch.high == 0).all()
    assert torch.equal(step.select(), expected)


def counting_paths(step: Step) -> list[set[bool]]:
    """By row, whether chunks of the last selection held many keys of the threshold's exponent.

    Those are counted all at once, and otherwise one by one.
    """
    axes, scratch = step.shape, step.scratch
    length, size = step.case.shape.length, axes.select_block * axes.blocks_per_chunk
    exponents = scratch.key[:, :length].int().cpu() >> 8
    is_shared = exponents == scratch.plan[:, :1].cpu()
    return [
        {int(chunk.sum()) > axes.select_block // 8 for chunk in row.split(size)}
        for row in is_shared
    ]


def check_agreement(case: Retrieval, device: torch.device) -> None:
    """The reference's tokens, but for those that rounding makes equal to the last one chosen."""
    step = make_step(case, device)
    step.score()
    found = step.select().cpu()
    axes, temperature = case.shape, case.temperature
    margin = case.index.candidate_margin if case.refine else 0.0
    expected = select(
        reference.index_scores(case.index, step.state, step.query, axes.length, margin=margin),
        num_kv_heads=axes.num_kv_heads,
        budget=case.first_budget,
        sinks=case.sinks,
        recent=case.recent,
        per_query_head=case.per_query_head,
        scale=case.scale / temperature,
        softcap=case.softcap / temperature,
        sink_logits=None if step.sink_logits is None else step.sink_logits / temperature,
        visible=case.seen,
    )
    assert_well_formed(found)
    assert found.shape[:3] == expected.shape[:3]
    num_chosen = (found >= 0).sum(-1)
    assert torch.equal(num_chosen, (expected >= 0).sum(-1))
    logits, error = exact_logits(step)
    allowed = error.masked_fill(~case.seen.unsqueeze(4), 0.0).amax().item()
    priorities = exact_priorities(step, logits)
    # A logit and its log-sum are off by `allowed` each, for the one token as for the other; so are
    # both weights by 16 bits, and the key leaves out the rest of the priority.
    grid = first_grid(case)
    margin = 4 * allowed + 2 * math.log2(1 + 2.0**-9) + grid.step
    for place in np.ndindex(found.shape[:3]):
        ours, theirs = (set(lists[place].tolist()) for lists in (found, expected))
        missed, taken = theirs - ours - {-1}, ours - theirs - {-1}
        if missed:
            priority = priorities[place].clamp_min(grid.smallest).log2()
            assert priority[list(missed)].max() <= priority[list(taken)].min() + margin
