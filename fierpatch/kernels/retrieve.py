"""Choosing the tokens of a step: query transform, scores and selection, in five launches.

In six with a second scoring: candidates are selected in one less, then scored and chosen from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.index import RotatedIndex
from fierpatch.kernels.append import state_arguments
from fierpatch.kernels.constants import LOG2_E
from fierpatch.kernels.early import can_start_early
from fierpatch.kernels.launch import aligned, as_mask, as_rows
from fierpatch.kernels.logits import Logits
from fierpatch.kernels.query import LEVELS
from fierpatch.kernels.retrieval_kernels import (
    code_scores_specialization,
    fier_scores_specialization,
    first_keys,
    key_scores_specialization,
    query_specialization,
    refine_specialization,
    rotated_scores_specialization,
    select_specializations,
)
from fierpatch.kernels.shape import Scratch, Shape
from fierpatch.kernels.top_k import COARSE


def retrieve(
    shape: Shape,
    scratch: Scratch,
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
    visible: Tensor | None = None,
    *,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
    keys: Tensor | None = None,
    follows_append: bool = True,
) -> Tensor:
    """The tokens that each list attends to: int64 ``[B, H or Hq, T, width]``, padded with -1.

    `fierpatch.reference.select_from_index`, with the length read on the device.

    Args:
        query: ``[B, Hq, T, D]``.
        state: the index's tensors.
        counters: int64; the first is the number of tokens stored, and no other is read.
        visible: bool ``[B or 1, 1, T, S]`` of any strides; None means causal.
        keys: ``[B, H, C, D]``, where candidates are scored by them.
        follows_append: whether the kernel before is one of `fierpatch.kernels.append`, beside which
            the first one here may start, and not one that writes the query or the counters.
    """
    score(shape, scratch, query, state, counters, logits, visible, follows_append=follows_append)
    chosen = select(
        shape, scratch, counters, sinks=sinks, recent=recent, sink_logits=sink_logits,
        has_mask=visible is not None,
    )  # fmt: skip
    if not shape.refine:
        return chosen
    score_candidates(shape, scratch, query, state, logits, keys)
    return select_candidates(shape, scratch, sinks=sinks, recent=recent, sink_logits=sink_logits)


def score(
    shape: Shape,
    scratch: Scratch,
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
    visible: Tensor | None = None,
    *,
    follows_append: bool = True,
) -> None:
    """Fill ``scratch.weight`` and the softmax statistics of its tiles; arguments as `retrieve`."""
    query, logits = as_rows(query), _first(shape, logits).in_log2
    visible, strides = as_mask(visible)
    grid = (shape.tiles, shape.score_rows, shape.head_blocks)
    outputs = (scratch.weight, scratch.most, scratch.sum, scratch.count, scratch.high)
    sizes = (shape.num_kv_heads, shape.num_queries, shape.tiles)
    has_mask, has_cap = visible is not None, logits.has_cap
    if isinstance(shape.index, RotatedIndex):
        planes, scale, centre, balance, rotation, *_ = state_arguments(shape.index, state)
        is_early = can_start_early(query.device)
        margin = shape.index.candidate_margin * LEVELS.value if shape.refine else 0.0
        prepared = (scratch.total, scratch.unit, scratch.mean)
        query_specialization(shape, query.dtype, is_early and follows_append).launch(
            (shape.query_tasks, *grid[1:]),
            query, balance, rotation, centre, counters, scratch.operand, scratch.packed, *prepared,
            *query.stride()[:3], *sizes, logits.factor,
        )  # fmt: skip
        rotated_scores_specialization(shape, has_mask, has_cap, is_early).launch(
            grid, scratch.operand, *prepared,
            planes, scale, counters, visible, *outputs,
            *strides, *sizes, logits.softcap, margin,
        )  # fmt: skip
    else:
        fier_scores_specialization(shape, query.dtype, has_mask, has_cap).launch(
            grid, query, *state, counters, visible, *outputs,
            *query.stride()[:3], *strides, *sizes, logits.factor, logits.softcap,
        )  # fmt: skip


def select(
    shape: Shape,
    scratch: Scratch,
    counters: Tensor,
    *,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
    has_mask: bool = False,
) -> Tensor:
    """Token indices from what `score` left: int64 ``[B, H or Hq, T, width]``.

    The same tokens as `fierpatch.select.select` chooses from scores that round to the same keys.
    With a second scoring they are the candidates, ``scratch.candidates``.
    """
    sink_logits = None if sink_logits is None else aligned(sink_logits)
    token_indices = scratch.candidates if shape.refine else _new_lists(shape, counters.device)
    width = shape.num_candidates if shape.refine else shape.width
    grid = (shape.chunks, shape.rows, 1)
    sink_dtype = None if sink_logits is None else sink_logits.dtype
    is_early = can_start_early(counters.device)
    make_keys, count_low, compact = select_specializations(shape, has_mask, sink_dtype, is_early)
    keys, budget, blocks = first_keys(shape), shape.first_budget, shape.blocks_per_chunk
    make_keys.launch(
        grid, scratch.weight, scratch.most, scratch.sum, sink_logits, scratch.count, counters,
        scratch.key, scratch.high, scratch.chunk_low,
        shape.num_lists, shape.num_queries, shape.tiles, sinks, recent, blocks,
        keys.smallest(budget - sinks - recent), LOG2_E.value / shape.temperature,
    )  # fmt: skip
    parts = (scratch.high, scratch.chunk_low, scratch.chunk_over, scratch.plan)
    if not shape.refine:
        count_low.launch(grid, scratch.key, *parts, counters, budget, blocks)
    compact.launch(grid, scratch.key, *parts, counters, token_indices, budget, width, blocks)
    return token_indices


def score_candidates(
    shape: Shape,
    scratch: Scratch,
    query: Tensor,
    state: list[Tensor],
    logits: Logits,
    keys: Tensor | None = None,
) -> None:
    """Score the candidates that `select` left, after `score` prepared the query.

    Fills ``scratch.candidate_weight`` and the softmax statistics of its tiles.
    """
    own, first = logits.in_log2, _first(shape, logits).in_log2
    is_early = can_start_early(query.device)
    outputs = (scratch.candidate_weight, scratch.candidate_most, scratch.candidate_sum)
    lists = (shape.num_lists, shape.num_queries)
    if shape.refines_by_codes:
        planes, scale, _centre, _balance, _rotation, *codes = state_arguments(shape.index, state)
        blocks = 1 if shape.per_query_head else shape.head_blocks
        code_scores_specialization(shape, own.has_cap, is_early).launch(
            (shape.candidate_tiles, shape.rows, blocks),
            scratch.packed, scratch.total, scratch.unit, scratch.mean, planes, scale, *codes,
            scratch.candidates, *outputs, *lists, shape.tiles, shape.num_candidates,
            own.factor / first.factor, own.softcap,
        )  # fmt: skip
    else:
        assert keys is not None
        query = as_rows(query)
        key_scores_specialization(shape, query.dtype, own.has_cap, is_early).launch(
            (shape.candidate_tiles, shape.rows, 1),
            query, keys, scratch.candidates, *outputs, *query.stride()[:3], *lists,
            keys.shape[2], shape.num_candidates, own.factor, own.softcap,
        )  # fmt: skip


def select_candidates(
    shape: Shape,
    scratch: Scratch,
    *,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Token indices from what `score_candidates` left: int64 ``[B, H or Hq, T, width]``."""
    sink_logits = None if sink_logits is None else aligned(sink_logits)
    sink_dtype = None if sink_logits is None else sink_logits.dtype
    device = scratch.candidates.device
    token_indices = _new_lists(shape, device)
    refine_specialization(shape, sink_dtype, can_start_early(device)).launch(
        (shape.rows, 1, 1),
        scratch.candidate_weight, scratch.candidate_most, scratch.candidate_sum, sink_logits,
        scratch.candidates, scratch.plan, scratch.candidate_key, token_indices,
        shape.num_lists, shape.num_queries, sinks, recent,
        COARSE.smallest(shape.budget - sinks - recent), shape.budget, shape.num_candidates,
        shape.width, LOG2_E.value,
    )  # fmt: skip
    return token_indices


def _first(shape: Shape, logits: Logits) -> Logits:
    """The logits of the first scoring: of candidates where there are any."""
    return logits.over(shape.temperature) if shape.refine else logits


def _new_lists(shape: Shape, device: torch.device) -> Tensor:
    lists = (shape.batch_size, shape.num_lists, shape.num_queries, shape.width)
    return torch.empty(lists, dtype=torch.int64, device=device)
