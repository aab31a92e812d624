"""Choosing the tokens of a step: query transform, scores and selection, three launches."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from fierpatch.index import RotatedIndex
from fierpatch.index.rotation import rotation_norm
from fierpatch.kernels.constants import MAX_HEADS
from fierpatch.kernels.early import can_start_early
from fierpatch.kernels.launch import Specialization, aligned, as_mask, as_rows
from fierpatch.kernels.logits import Logits
from fierpatch.kernels.query import query_kernel
from fierpatch.kernels.scores import fier_scores_kernel, rotated_scores_kernel
from fierpatch.kernels.shape import CHANNELS_AT_ONCE, GROUPS_AT_ONCE, Scratch, Shape
from fierpatch.kernels.top_k import compact_kernel, key_kernel, low_kernel

_TOKENS_PER_WARP = 512  # of the selection: what a warp does for its program costs as much as 100


def score(
    shape: Shape,
    scratch: Scratch,
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
    visible: Tensor | None = None,
) -> None:
    """Fill ``scratch.weight`` and the softmax statistics of its tiles.

    Args:
        query: ``[B, Hq, T, D]``.
        state: the index's tensors.
        counters: int64 ``[4]``; the first is the number of tokens stored.
        visible: bool ``[B or 1, 1, T, S]`` of any strides; None means causal.
    """
    query, logits = as_rows(query), logits.in_log2
    visible, strides = as_mask(visible)
    grid = (shape.tiles, shape.score_rows, shape.head_blocks)
    outputs = (scratch.weight, scratch.most, scratch.sum, scratch.count, scratch.high)
    sizes = (shape.num_kv_heads, shape.num_queries, shape.tiles)
    has_mask, has_cap = visible is not None, logits.has_cap
    if isinstance(shape.index, RotatedIndex):
        planes, scale, centre, balance, rotation = state
        is_early = can_start_early(query.device)
        prepared = (scratch.total, scratch.unit, scratch.mean)
        query_specialization(shape, query.dtype, is_early).launch(
            (shape.query_tasks, *grid[1:]),
            query, balance, rotation, centre, counters, scratch.operand, *prepared,
            *query.stride()[:3], *sizes, logits.factor,
        )  # fmt: skip
        rotated_scores_specialization(shape, has_mask, has_cap, is_early).launch(
            grid, scratch.operand, *prepared,
            planes, scale, counters, visible, *outputs,
            *strides, *sizes, logits.softcap,
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
    """
    sink_logits = None if sink_logits is None else aligned(sink_logits)
    lists = (shape.batch_size, shape.num_lists, shape.num_queries, shape.width)
    token_indices = torch.empty(lists, dtype=torch.int64, device=scratch.key.device)
    grid = (shape.chunks, shape.rows, 1)
    sink_dtype = None if sink_logits is None else sink_logits.dtype
    is_early = can_start_early(counters.device)
    make_keys, count_low, compact = select_specializations(shape, has_mask, sink_dtype, is_early)
    make_keys.launch(
        grid, scratch.weight, scratch.most, scratch.sum, sink_logits, scratch.count, counters,
        scratch.key, scratch.high,
        shape.num_lists, shape.num_queries, shape.tiles, sinks, recent, shape.blocks_per_chunk,
    )  # fmt: skip
    parts = (scratch.high, scratch.chunk_low, scratch.chunk_over, scratch.plan)
    blocks = shape.blocks_per_chunk
    count_low.launch(grid, scratch.key, *parts, counters, shape.budget, blocks)
    compact.launch(
        grid, scratch.key, *parts, counters, token_indices, shape.budget, shape.width, blocks
    )
    return token_indices


def _head_constants(shape: Shape) -> dict[str, int]:
    """What the query transform and the scores of the rotated index share."""
    head_dim = shape.index.head_dim
    return {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
        "HEADS": shape.heads,
        "BLOCKS": shape.head_blocks,
        "GROUP": shape.index.group_size,
    }


@cache
def query_specialization(shape: Shape, dtype: torch.dtype, is_early: bool) -> Specialization:
    """Of `query_kernel`."""
    head_dim = shape.index.head_dim
    constants = {
        **_head_constants(shape),
        "OUT": CHANNELS_AT_ONCE,
        "GROUPS": GROUPS_AT_ONCE,
        "NORM": rotation_norm(head_dim),
        "SPLIT": dtype == torch.float32,
        "IS_EARLY": is_early,
    }
    num_warps = 2 if head_dim <= 128 else 4
    return Specialization(query_kernel, constants, num_warps=num_warps, is_early=is_early)


@cache
def rotated_scores_specialization(
    shape: Shape, has_mask: bool, has_cap: bool, is_early: bool
) -> Specialization:
    """Of `rotated_scores_kernel`."""
    assert isinstance(shape.index, RotatedIndex)
    head_dim = shape.index.head_dim
    channel_blocks = triton.cdiv(head_dim, CHANNELS_AT_ONCE)
    constants = {
        **_head_constants(shape),
        "BITS": shape.index.bits,
        "CHANNEL_BLOCKS": channel_blocks,
        "BLOCK_C": triton.next_power_of_2(channel_blocks),
        "LISTS": shape.num_lists // shape.num_kv_heads,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
        "IS_EARLY": is_early,
    }
    return Specialization(
        rotated_scores_kernel, constants, num_warps=2, num_stages=1, is_early=is_early
    )


@cache
def fier_scores_specialization(
    shape: Shape, dtype: torch.dtype, has_mask: bool, has_cap: bool
) -> Specialization:
    """Of `fier_scores_kernel`."""
    head_dim = shape.index.head_dim
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
        "HEADS": MAX_HEADS.value,  # the matrix units want 8 columns
        "GROUP": shape.index.group_size,
        "LISTS": shape.num_lists // shape.num_kv_heads,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
    }
    num_warps = 2 if head_dim <= 128 else 4
    return Specialization(fier_scores_kernel, constants, num_warps=num_warps, num_stages=1)


@cache
def select_specializations(
    shape: Shape, has_mask: bool, sink_dtype: torch.dtype | None, is_early: bool
) -> tuple[Specialization, Specialization, Specialization]:
    """Of `key_kernel`, `low_kernel` and `compact_kernel`.

    What grows with the context is no constant, or is one in few steps: a growing cache would
    otherwise stop to compile.
    """
    heads = 1 if shape.per_query_head else shape.num_groups
    block = {"BLOCK": shape.select_block}
    keys = {
        "G": shape.num_groups,
        "HEADS": heads,
        "BLOCK_H": triton.next_power_of_2(heads),
        **block,
        "BLOCK_TILES": 512 if shape.tiles > 256 else 256,
        "HAS_MASK": has_mask,
        "HAS_SINK": sink_dtype is not None,
    }
    at_once = min(max(triton.next_power_of_2(shape.chunks), 8), 32)
    pieces = triton.cdiv(shape.chunks, at_once)
    chunks = {"CHUNKS": at_once, "PIECES": pieces, "BLOCK_W": 1024}
    num_warps = max(shape.select_block // _TOKENS_PER_WARP, 1)
    early = {"IS_EARLY": is_early}
    return (
        Specialization(key_kernel, keys | early, num_warps=num_warps, is_early=is_early),
        Specialization(low_kernel, block | early, num_warps=num_warps),
        Specialization(
            compact_kernel, block | chunks | early, num_warps=num_warps, is_early=is_early
        ),
    )
