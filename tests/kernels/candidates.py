"""The second scoring of candidates in float64, and which of them a kernel has to choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch import reference
from fierpatch.index import RotatedIndex
from kernels.choices import LOGITS, assert_well_formed, check_chosen, coarse
from kernels.scores import QUERY_LEVELS, as_logits, half_bits
from kernels.steps import Build, Retrieval, Step, any_refining_build, make_step, retrievals
from oracles import FLOAT32_EPS
from states import held
from strategies import Shape


def by_list(step: Step, tensor: Tensor) -> Tensor:
    """``[B, Hq, ...]`` as ``[B, lists, heads of one, ...]``."""
    return tensor.unflatten(1, (step.shape.num_lists, step.shape.list_heads))


def of_lists(step: Step, tensor: Tensor) -> Tensor:
    """``[B, H, ...]`` as ``[B, lists, ...]``."""
    return tensor.repeat_interleave(step.shape.num_lists // step.shape.num_kv_heads, 1)


def exact_candidate_logits(step: Step, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the second scoring in float64, and the error that a kernel may make.

    Args:
        candidates: int64 ``[B, lists, T, n]``.

    Returns:
        Both ``[B, lists, T, n, heads]``, in units of log2.
    """
    case, index = step.case, step.case.index
    head_dim, summed = case.shape.head_dim, 2 * (case.shape.head_dim + 8) * FLOAT32_EPS
    query = by_list(step, step.query.double()).transpose(2, 3)  # [B, lists, T, heads, D]
    tokens = candidates.clamp_min(0)

    def gather(rows: Tensor) -> Tensor:
        """``[B, H, S, D]`` of the candidates: ``[B, lists, T, n, D]``."""
        at = tokens.flatten(2).unsqueeze(3).expand(-1, -1, -1, rows.shape[3])
        return of_lists(step, rows.double()).gather(2, at).unflatten(2, tokens.shape[2:])

    if not step.shape.refines_by_codes:
        keys = gather(step.keys)
        scores = keys @ query.mT  # [B, lists, T, n, heads]
        error = summed * keys.norm(dim=-1, keepdim=True) * query.norm(dim=-1).unsqueeze(3)
        return as_logits(case, scores, error)
    assert isinstance(index, RotatedIndex)
    parts = held(index, step.state, case.shape.length)
    levels, ratio = index.refinement.decode(
        parts["bits"][:, :, :, 0], parts["codes"], parts["ratio"]
    )
    scale = gather((parts["scale"].double() * ratio.double()).unsqueeze(3))  # [B, lists, T, n, 1]
    levels, centre = (
        gather(levels),
        gather(parts["centre"].repeat_interleave(index.group_size, 2)[:, :, : case.shape.length]),
    )
    matrix = torch.from_numpy(oracles.rotation(head_dim, index.seed))
    balance = of_lists(step, parts["balance"].double())[:, :, None, None]
    rotated = query / balance @ matrix
    scores = scale * (levels @ rotated.mT) + centre @ query.mT
    norm = rotated.norm(dim=-1).unsqueeze(3)  # [B, lists, T, 1, heads]
    # As in `exact_scores`: channels are whole numbers after a float32 rotation, and what those add
    # up to becomes float32.
    channel = norm / (2 * QUERY_LEVELS) + summed * norm
    sizes = levels.abs().sum(-1, keepdim=True)
    rounded = 12 * FLOAT32_EPS * levels.abs().amax() * math.sqrt(head_dim) * norm
    error = scale * (sizes * channel + rounded)
    error += summed * query.norm(dim=-1).unsqueeze(3) * centre.norm(dim=-1, keepdim=True)
    return as_logits(case, scores, error + 4 * FLOAT32_EPS * scores.abs())


def held_logits(step: Step) -> Tensor:
    """What `score_candidates` left, float64 ``[B, lists, T, n, heads]``; -inf for unused slots."""
    shape, scratch = step.shape, step.scratch
    bits = scratch.candidate_weight.cpu().int()  # [rows, tiles, TILE, heads]
    weights = (bits << 15).view(torch.float32).double()
    logits = weights.log2() + scratch.candidate_most.cpu().double().unsqueeze(2)
    logits = logits.masked_fill(bits == 0, -torch.inf).flatten(1, 2)
    lists = (shape.batch_size, shape.num_lists, shape.num_queries)
    return logits.unflatten(0, lists)[:, :, :, : shape.num_candidates]


def check_candidate_scores(case: Retrieval, device: torch.device) -> None:
    """Candidates' logits are those of their codes or keys, to 16 bits of weight."""
    step = make_step(case, device)
    step.score()
    candidates = step.select().cpu()
    step.score_candidates()
    found = held_logits(step)
    expected, allowed = exact_candidate_logits(step, candidates)
    is_used = (candidates >= 0).unsqueeze(4).expand_as(found)
    assert torch.equal(found > -torch.inf, is_used)
    # A weight far below its tile's largest is flushed to the least there is.
    near = is_used & (expected > expected.masked_fill(~is_used, -torch.inf).amax(3, True) - 100)
    assert ((found - expected).abs() <= allowed + math.log2(1 + 2.0**-8) + 1e-4)[near].all()
    check_second_choice(step, candidates, found, rounding=2.0**-8)


def check_second_choice(
    step: Step, candidates: Tensor, logits: Tensor, rounding: float = 0.0
) -> None:
    """`select_candidates` chooses exactly the largest coarse keys, of the slots of a list.

    Args:
        candidates: int64 ``[B, lists, T, n]``.
        logits: ``[B, lists, T, n, heads]``, of which the scratch holds the weights.
    """
    found = step.select_candidates().cpu()
    assert_well_formed(found)
    is_used = candidates >= 0
    # Unused slots stand behind all tokens, so that the lists ascend.
    ascending = torch.where(is_used, candidates, torch.iinfo(torch.int64).max)
    slots = torch.searchsorted(ascending, found)
    slots = torch.where(found >= 0, slots, -1)
    case, shape = step.case, step.shape
    size = candidates.shape[3]
    assert torch.equal(ascending.gather(3, slots.clamp(0, size - 1))[found >= 0], found[found >= 0])
    axes = replace(
        case.shape, num_kv_heads=shape.num_lists, num_groups=shape.list_heads, length=size
    )
    # One row of slots serves all lists: they see equally many tokens.
    lists = replace(case, shape=axes, refine=0, per_query_head=False, visible=is_used[:, :1])
    grid = coarse(case.budget - case.sinks - case.recent)
    check_chosen(replace(step, case=lists), slots, logits, grid, rounding)


@dataclass(frozen=True)
class SecondChoice:
    """Logits of a kind for candidates drawn at random."""

    case: Retrieval
    logits: Callable[..., Tensor]
    used: float = 1.0  # the share of slots that are


@st.composite
def second_choices(
    draw: st.DrawFn, *, builds: st.SearchStrategy[Build] | None = None, longest: int = 1100
) -> SecondChoice:
    builds = any_refining_build() if builds is None else builds
    case = draw(retrievals(builds=builds, longest=longest, most_rows=2))
    index = replace(case.index, head_dim=8)
    axes = replace(case.shape, head_dim=8, value_head_dim=8)
    case = replace(case, index=index, shape=axes, softcap=0.0, visible=None)
    return SecondChoice(
        case, draw(st.sampled_from(LOGITS)), draw(st.sampled_from((1.0, 0.5, 0.01)))
    )


def check_injected(choice: SecondChoice, device: torch.device) -> None:
    """As `check_second_choice`, of logits put where `score_candidates` leaves its own."""
    case = choice.case
    step = make_step(case, device, is_indexed=False)
    shape, scratch = step.shape, step.scratch
    generator = torch.Generator().manual_seed(case.seed)
    lists = (shape.batch_size, shape.num_lists, shape.num_queries)
    size, padded = shape.num_candidates, scratch.candidate_weight.shape[1] * 32
    num_used = max(int(size * choice.used), min(size, case.sinks + case.recent), 1)
    order = torch.rand(*lists, shape.tiles * 512, generator=generator).argsort(-1)
    candidates = order[..., :size].sort(-1).values
    candidates[..., num_used:] = -1
    logits = choice.logits((*lists, size, shape.list_heads), generator).double()
    logits[..., num_used:, :] = -torch.inf
    tiles = torch.full((*lists, padded, shape.list_heads), -torch.inf, dtype=torch.float64)
    tiles[..., :size, :] = logits.float().double()
    tiles = tiles.flatten(0, 2).unflatten(1, (-1, 32))  # [rows, tiles, TILE, heads]
    most = tiles.amax(2, keepdim=True)
    bits = half_bits(torch.exp2(tiles - most.nan_to_num(neginf=0.0)))
    bits = bits.masked_fill(tiles == -torch.inf, 0)
    weights = (bits << 15).view(torch.float32).double()
    scratch.candidate_weight.copy_(bits)
    scratch.candidate_most.copy_(most.squeeze(2))
    scratch.candidate_sum.copy_(weights.sum(2))
    scratch.candidates.copy_(candidates.flatten(0, 2))
    scratch.plan[:, 1] = num_used
    check_second_choice(step, candidates, held_logits(step))


def check_refined_lists(case: Retrieval, device: torch.device) -> None:
    """With a candidate for every token, the lists hold what the reference's lists weigh."""
    least = -(-case.shape.length // case.refine)
    step = make_step(replace(case, budget=max(case.budget, least)), device)
    case, axes = step.case, step.case.shape
    step.score()
    candidates = step.select().cpu()
    visible = case.seen.sum(-1)  # [B, 1, T]
    assert torch.equal((candidates >= 0).sum(-1), visible.expand(candidates.shape[:3]))
    step.score_candidates()
    found = step.select_candidates().cpu()
    expected = reference.select_from_index(
        case.index, step.state, step.query, axes.length, budget=case.budget, sinks=case.sinks,
        recent=case.recent, per_query_head=case.per_query_head, scale=case.scale,
        softcap=case.softcap, sink_logits=step.sink_logits, visible=case.seen,
        refine=case.refine, keys=None if step.shape.refines_by_codes else step.keys,
    )  # fmt: skip
    assert torch.equal((found >= 0).sum(-1), (expected >= 0).sum(-1))
    logits, _ = exact_candidate_logits(step, candidates)
    logits = logits.masked_fill((candidates < 0).unsqueeze(4), -torch.inf)
    weights = (logits * math.log(2)).softmax(3).nan_to_num().mean(4)  # [B, lists, T, n]
    spread = weights.new_zeros(*weights.shape[:3], axes.length + 1)
    spread.scatter_(3, torch.where(candidates >= 0, candidates, axes.length), weights)

    def share(lists: Tensor) -> Tensor:
        return spread.gather(3, lists.clamp_min(0)).masked_fill(lists < 0, 0.0).sum(-1)

    # Tokens within a quarter of an octave may stand for each other, and those 15 octaves down.
    assert (share(found) >= share(expected) * 0.8 - 2.0**-10).all()


CODED = RotatedIndex(64, refine_bits=4)


def coded(num_groups: int = 4, **sizes: int) -> Retrieval:
    """600 tokens of one KV head by 4 bits, 40 of 160 candidates."""
    axes = Shape(1, 1, num_groups, 1, 600, 64, 64)
    return Retrieval(CODED, replace(axes, **sizes), budget=40, sinks=4, recent=8, refine=4)
