"""What a step scores in float64, how far a kernel may be from it, and the check of that."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import oracles
from fierpatch.index import RotatedIndex
from fierpatch.index.packing import TILE_SIZE, num_tiles
from fierpatch.select import to_logits
from kernels.steps import Retrieval, Step, make_step
from oracles import FLOAT16_EPS, FLOAT16_STEP, FLOAT32_EPS
from states import held

LOG2_E = 1.4426950408889634
QUERY_LEVELS = 32512  # whole numbers that a channel of the rotated query may take


def exact_scores(step: Step) -> tuple[Tensor, Tensor]:
    """The index's estimate in float64, and the error that a kernel may make: ``[B, H, T, S, G]``.

    Where there is a second scoring, the estimate has the margin that candidates are chosen by.

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
        norm = rotated.norm(dim=-1)[:, :, :, None]  # [B, H, T, 1, G]
        margin = index.candidate_margin if step.case.refine else 0.0
        scores = scale * (dot(rotated, levels) + margin * norm) + dot(query, centre)
        # Each channel is rounded to a multiple of norm / 32512, after a float32 rotation of norm.
        channel = norm / (2 * QUERY_LEVELS) + summed * norm
        sizes = levels.abs().sum(-1)[:, :, None, :, None]
        # Then whole numbers up to |levels| |rotated| turn into float32 and are multiplied.
        rounded = 10 * FLOAT32_EPS * levels.abs().amax() * math.sqrt(axes.head_dim) * norm
        error = scale * (sizes * channel + rounded + margin * summed * norm)
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
    scores, error = exact_scores(step)
    return as_logits(step.case, scores, error, step.case.temperature)


def as_logits(
    case: Retrieval, scores: Tensor, error: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scores and their error as logits in units of log2."""
    scale, softcap = case.scale / temperature, case.softcap / temperature
    logits = to_logits(scores, scale, softcap) * LOG2_E
    error = error * scale * LOG2_E + 8 * FLOAT32_EPS * logits.abs()
    return logits, error + 8 * FLOAT32_EPS * softcap * LOG2_E


def log_sums(step: Step, logits: Tensor) -> Tensor:
    """Each head's log2-sum-exp2 beside its sink: ``[B, H, T, G]``, 0 where nothing is seen."""
    seen = step.case.seen.unsqueeze(4)
    log2 = logits.masked_fill(~seen, -torch.inf) / LOG2_E
    if step.sink_logits is not None:
        sink = step.sink_logits.double().view(1, log2.shape[1], 1, 1, -1) / step.case.temperature
        log2 = torch.cat((log2, sink.expand(*log2.shape[:3], 1, -1)), dim=3)
    return (log2.logsumexp(3) * LOG2_E).nan_to_num(neginf=0.0)


def exact_priorities(step: Step, logits: Tensor) -> Tensor:
    """What a list ranks tokens by, float64 ``[B, H or Hq, T, S]``; 0 where invisible."""
    logits = logits.masked_fill(~step.case.seen.unsqueeze(4), -torch.inf)
    weights = torch.exp2(logits - log_sums(step, logits).unsqueeze(3))
    if step.case.per_query_head:
        return weights.permute(0, 1, 4, 2, 3).flatten(1, 2)
    return weights.mean(4)


def by_tile(tokens: Tensor, value: float) -> Tensor:
    """``[B, H, T, S, G]`` as ``[B, H, T, tiles, 512, G]``, with `value` in the last tile's rest."""
    tiles = num_tiles(tokens.shape[3])
    ends = (0, 0, 0, tiles * TILE_SIZE - tokens.shape[3])
    return torch.nn.functional.pad(tokens, ends, value=value).unflatten(3, (tiles, -1))


def half_bits(weights: Tensor) -> Tensor:
    """Visible weights in 16 bits, as a kernel leaves them: int32, 1 at least."""
    return ((weights.float().view(torch.int32) + 0x4000) >> 15).clamp_min(1)


def check_scores(case: Retrieval, device: torch.device) -> None:
    """Weights within what the kernel rounds, beside their tile's largest, and their sums."""
    step = make_step(case, device)
    step.score()
    axes = case.shape
    found, is_seen = step.weights()
    expected, allowed = exact_logits(step)
    seen = case.seen.unsqueeze(4).expand_as(found)  # [B, H, T, S, G]
    assert torch.equal(is_seen, seen)
    expected, allowed = expected.masked_fill(~seen, -torch.inf), allowed.masked_fill(~seen, 0.0)
    expected, allowed = by_tile(expected, -torch.inf), by_tile(allowed, 0.0)

    sizes = (axes.batch_size, axes.num_kv_heads, axes.num_queries, -1, axes.num_groups)
    tiles = num_tiles(axes.length)
    most, total = (
        x.view(sizes)[:, :, :, :tiles].cpu().double() for x in (step.scratch.most, step.scratch.sum)
    )
    largest = expected.amax(4)
    has_any = largest > -torch.inf
    assert torch.equal(most > -torch.inf, has_any)
    assert ((most - largest).abs() <= allowed.amax(4))[has_any].all()
    distance = expected - most.nan_to_num(neginf=0.0).unsqueeze(4)
    # Beside the logit's own error, a subtraction and an exp2 of 4 roundings.
    error = allowed + 4 * FLOAT32_EPS * distance.abs().nan_to_num(posinf=0.0)
    least = torch.exp2(distance - error) * (1 - 4 * FLOAT32_EPS)
    greatest = torch.exp2(distance + error) * (1 + 4 * FLOAT32_EPS)
    rounding, tiny = 2.0**-9, 2.0**-126  # of 16 bits; less is flushed to zero or to the least
    weights = by_tile(found, 0.0)
    assert (weights >= least * (1 - rounding) - tiny).all()
    assert (weights <= greatest * (1 + rounding) + tiny).all()
    summed = 512 * FLOAT32_EPS
    assert (total >= least.sum(4) * (1 - summed) - 512 * tiny).all()
    assert (total <= greatest.sum(4) * (1 + summed) + 512 * tiny).all()
    if case.visible is not None:
        counts = by_tile(case.seen[:, :, :, :, None].expand(-1, 1, -1, -1, 1), 0).sum(4)[
            :, 0, ..., 0
        ]
        assert torch.equal(step.scratch.count[:, :, :tiles].cpu(), counts.int())
