"""Exact attention over a list of positions or all, split over programs, merged by the last."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fierpatch.hot_set import HotSet
from fierpatch.kernels import residency
from fierpatch.kernels.attention_block import (
    attend_block,
    block_size,
    leave,
    product_constants,
)
from fierpatch.kernels.constants import LOG2_E
from fierpatch.kernels.early import await_previous, can_start_early
from fierpatch.kernels.launch import Specialization, aligned, as_mask, as_rows
from fierpatch.kernels.layout import pair_width, rows_of
from fierpatch.kernels.logits import Logits

_MAX_SPLITS = 16
_MAX_DENSE_SPLITS = 64


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_t", "visible_stride_b", "visible_stride_t",
        "num_lists", "num_queries", "capacity", "width", "hot_rows",
    ]
)  # fmt: skip
def gather_attention_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    token_index_ptr,
    place_ptr,
    left_ptr,
    hot_ptr,
    row_of_ptr,
    visible_ptr,
    sink_ptr,
    counters_ptr,
    partial_ptr,
    most_ptr,
    total_ptr,
    arrivals_ptr,
    output_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_t: tl.int64,
    visible_stride_b: tl.int64,
    visible_stride_t: tl.int64,
    num_lists,
    num_queries,
    capacity,
    width,
    hot_rows,
    logit_scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LISTS_PER_KV_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_LIST: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_COUNTERS: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """The query heads of one list over one split of it; a row is ``(b, list, t)``.

    Without a list, over one split of all tokens stored that the mask, or causality, allows. With
    one, it starts beside the kernel that writes the list.

    With hot rows ``[lists, hot_rows, D + DV]`` a token is read there if row_of, ``[lists,
    capacity]``, names a row, else among the paired rows. What is missing so is left in the row that
    `place_kernel` gives it. That decides meanwhile: it waits for the list before it lets this
    start, and changes no row_of, so that it need not have ended before rows are left; where a
    program has one block, at the very end.

    The softmax is online (Milakov and Gimelshein, arXiv 1805.02867). Its logits turn into units of
    log2 as differences to the largest, which are near 0 where the weight is not.
    A split leaves partial float32 ``[row, split, HEADS, DV]``, and most and total float32 ``[row,
    split, HEADS]``, the largest logit and the sum of the weights relative to it. output is ``[B, T,
    Hq, DV]``. arrivals int32 ``[rows]`` is 0 before and after.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    t = row % num_queries
    list_ = row // num_queries % num_lists
    b = row // num_queries // num_lists
    kv_row = b * (num_lists // LISTS_PER_KV_HEAD) + list_ // LISTS_PER_KV_HEAD
    head = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    query_ptr += b * stride_b + list_ * HEADS * stride_h + t * stride_t
    query = tl.load(
        query_ptr + head[:, None].to(tl.int64) * stride_h + channel[None, :],
        mask=(head < HEADS)[:, None] & (channel < D)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    if HAS_LIST:
        token_index_ptr += row * width
        if HAS_HOT:
            place_ptr += row * width
            left_ptr += row * width
            hot_ptr += row * hot_rows * PAIR
            row_of_ptr += row * capacity
        else:
            await_previous(IS_EARLY)
    else:
        width = tl.minimum(tl.load(counters_ptr).to(tl.int32), capacity)
        if HAS_MASK:
            visible_ptr += b * visible_stride_b + t * visible_stride_t
        else:
            width -= (num_queries - 1 - t).to(tl.int32)
    num_kv_rows = tl.num_programs(0) // num_queries // LISTS_PER_KV_HEAD
    keys_ptr, key_step = rows_of(keys_ptr, kv_row, num_kv_rows, capacity, D, PAIR)
    values_ptr, value_step = rows_of(values_ptr, kv_row, num_kv_rows, capacity, DV, PAIR)
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mixed = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    share = tl.cdiv(tl.cdiv(width, SPLITS), BLOCK_N) * BLOCK_N
    own_slot = split * share + tl.arange(0, BLOCK_N)
    if IS_ONE_BLOCK:
        most, total, mixed, keys, values, token, is_missing = attend_block(
            query, own_slot, most, total, mixed, keys_ptr, values_ptr, key_step, value_step,
            token_index_ptr, hot_ptr, row_of_ptr, visible_ptr, width, capacity,
            logit_scale, softcap,
            D, BLOCK_D, DV, PAIR, BLOCK_DV, SLICES, PRECISION, HAS_LIST, HAS_HOT, HAS_MASK, HAS_CAP,
        )  # fmt: skip
    else:
        for start in range(split * share, tl.minimum(split * share + share, width), BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            most, total, mixed, keys, values, token, is_missing = attend_block(
                query, slot, most, total, mixed, keys_ptr, values_ptr, key_step, value_step,
                token_index_ptr, hot_ptr, row_of_ptr, visible_ptr, width, capacity,
                logit_scale, softcap,
                D, BLOCK_D, DV, PAIR, BLOCK_DV, SLICES, PRECISION,
                HAS_LIST, HAS_HOT, HAS_MASK, HAS_CAP,
            )  # fmt: skip
            if HAS_HOT:
                await_previous(IS_EARLY)
                leave(
                    keys, values, token, slot, is_missing, place_ptr, left_ptr, hot_ptr, row_of_ptr,
                    D, BLOCK_D, DV, PAIR, BLOCK_DV,
                )  # fmt: skip
    place = (row * SPLITS + split) * HEADS + head
    mask = (head < HEADS)[:, None] & (value_channel < DV)[None, :]
    tl.store(partial_ptr + place[:, None] * DV + value_channel[None, :], mixed, mask=mask)
    tl.store(most_ptr + place, most, mask=head < HEADS)
    tl.store(total_ptr + place, total, mask=head < HEADS)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        tl.store(arrivals_ptr + row, 0)
        is_full = False
        if HAS_COUNTERS:
            is_full = tl.load(counters_ptr) > capacity
        splits = (row * SPLITS + tl.arange(0, SPLITS))[:, None]
        query_heads = num_lists * HEADS
        output_ptr += ((b * num_queries + t) * query_heads + list_ * HEADS) * DV
        for first in tl.static_range(0, HEADS * DV, BLOCK_M):
            column = first + tl.arange(0, BLOCK_M)
            within = column < HEADS * DV
            head_of = tl.minimum(column // DV, HEADS - 1)
            # Past the first-level cache, which does not see what other programs write.
            sums = splits * HEADS + head_of[None, :]
            mosts = tl.load(most_ptr + sums, cache_modifier=".cg")
            totals = tl.load(total_ptr + sums, cache_modifier=".cg")
            parts = tl.load(
                partial_ptr + splits * (HEADS * DV) + column[None, :],
                mask=within[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            peak = tl.max(mosts, axis=0)
            if HAS_SINK:
                sink = tl.load(sink_ptr + list_ * HEADS + head_of).to(tl.float32)
                peak = tl.maximum(peak, sink)
            peak = tl.where(peak == float("-inf"), 0.0, peak)
            shares = tl.exp2((mosts - peak[None, :]) * LOG2_E)
            denominator = tl.sum(totals * shares, axis=0)
            if HAS_SINK:
                denominator += tl.exp2((sink - peak) * LOG2_E)
            merged = tl.sum(parts * shares, axis=0) / tl.where(denominator > 0, denominator, 1.0)
            # More tokens than the cache holds cannot raise on the device, but must not pass.
            merged = tl.where(is_full, float("nan"), merged)
            tl.store(output_ptr + column, merged, mask=within)
    if HAS_HOT and IS_ONE_BLOCK:
        await_previous(IS_EARLY)
        leave(
            keys, values, token, own_slot, is_missing,
            place_ptr, left_ptr, hot_ptr, row_of_ptr, D, BLOCK_D, DV, PAIR, BLOCK_DV,
        )  # fmt: skip


def num_splits(num_rows: int, width: int) -> int:
    """Programs that share one row's list: enough to fill a GPU, each with 64 tokens or more."""
    splits = 1
    while splits < _MAX_SPLITS and num_rows * splits < 512 and 2 * splits * 64 <= width:
        splits *= 2
    return splits


def num_dense_splits(num_rows: int, capacity: int) -> int:
    """Programs that share all tokens of one row: enough to fill a GPU twice."""
    splits = 1
    while splits < _MAX_DENSE_SPLITS and num_rows * splits < 256 and splits * 256 < capacity:
        splits *= 2
    return splits


def gather_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    counters: Tensor | None = None,
    arrivals: Tensor | None = None,
    allocate: Callable[[int], Tensor] | None = None,
    hot: HotSet | None = None,
) -> Tensor:
    """`fierpatch.reference.gather_attention` with heads and queries swapped.

    Args:
        query: ``[B, Hq, T, D]``, last dimension contiguous.
        keys, values: ``[B, H, C, D]``, ``[B, H, C, Dv]``, contiguous or paired.
        token_indices: int64 ``[B, H or Hq, T, K]``, contiguous; -1 marks an unused slot.
        counters: with them, the output is NaN if more tokens were stored than C.
        arrivals: int32 zeros, one a row of `token_indices` at least; left as they are found.
        allocate: gives room for so many float32 numbers; None is fresh memory.
        hot: a hot set of as many lists, in which they are placed; missing rows are fetched. For one
            query and paired rows.

    Returns:
        ``[B, T, Hq, Dv]`` in the query's dtype.
    """
    batch_size, num_queries = query.shape[0], query.shape[2]
    num_lists, width = token_indices.shape[1], token_indices.shape[3]
    splits = num_splits(batch_size * num_lists * num_queries, width)
    return _attend(
        query, keys, values, token_indices, hot, None, num_lists, width, splits,
        scale, softcap, sink_logits, counters, arrivals, allocate,
    )  # fmt: skip


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counters: Tensor,
    visible: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    arrivals: Tensor | None = None,
    allocate: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Attention of the newest tokens over all that are stored, their number read on the device.

    Args:
        counters: int64; the first is the number of tokens stored.
        visible: bool ``[B or 1, 1, T, S]``; None means causal.

    Returns:
        ``[B, T, Hq, Dv]``. Other arguments as in `gather_attention`.
    """
    num_kv_heads, capacity = keys.shape[1], keys.shape[2]
    num_rows = query.shape[0] * num_kv_heads * query.shape[2]
    splits = num_dense_splits(num_rows, capacity)
    return _attend(
        query, keys, values, None, None, visible, num_kv_heads, capacity, splits,
        scale, softcap, sink_logits, counters, arrivals, allocate,
    )  # fmt: skip


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor | None,
    hot: HotSet | None,
    visible: Tensor | None,
    num_lists: int,
    width: int,
    splits: int,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    counters: Tensor | None,
    arrivals: Tensor | None,
    allocate: Callable[[int], Tensor] | None,
) -> Tensor:
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, capacity, value_head_dim = keys.shape[1], keys.shape[2], values.shape[3]
    num_rows = batch_size * num_lists * num_queries
    query = as_rows(query)
    sink_logits = None if sink_logits is None else aligned(sink_logits)
    visible, strides = as_mask(visible)
    if arrivals is None:
        arrivals = torch.zeros(num_rows, dtype=torch.int32, device=query.device)
    heads = num_heads // num_lists
    # What the splits write for each other, each from an aligned address.
    size = num_rows * splits * heads
    outputs_size, sums_size = _aligned_size(size * value_head_dim), _aligned_size(size)
    num_floats = outputs_size + 2 * sums_size
    if allocate is None:
        room = query.new_empty(num_floats, dtype=torch.float32)
    else:
        room = allocate(num_floats)
    most, total = room[outputs_size:], room[outputs_size + sums_size :]
    output = query.new_empty((batch_size, num_queries, num_heads, value_head_dim))
    logits = Logits(scale, softcap)
    hot_rows, row_of = (None, None) if hot is None else (hot.rows, hot.row_of)
    at_once = splits * block_size(max(head_dim, value_head_dim), query.dtype)
    specialization = attend_specialization(
        head_dim, value_head_dim, pair_width(keys), heads, num_lists // num_kv_heads, splits,
        query.dtype, logits.has_cap, None if sink_logits is None else sink_logits.dtype,
        counters is not None,
        token_indices is not None, None if row_of is None else row_of.dtype, visible is not None,
        hot is not None and width <= at_once,
        token_indices is not None and can_start_early(query.device),
    )  # fmt: skip

    place, left = None, None
    try:
        if hot is not None and token_indices is not None:
            place, left = residency.place(hot, token_indices)
        specialization.launch(
            (num_rows, splits, 1),
            query, keys, values, token_indices, place, left, hot_rows, row_of, visible,
            sink_logits, counters, room, most, total, arrivals, output,
            *query.stride()[:3], *strides, num_lists, num_queries, capacity, width,
            0 if hot_rows is None else hot_rows.shape[2], logits.factor, softcap,
        )  # fmt: skip
    except BaseException:
        if hot is not None:
            hot.clear()  # what has a place may not have come
        raise
    return output


def _aligned_size(size: int) -> int:
    """So many float32 numbers, or a few more, that what follows them is 16-byte aligned."""
    return -(-size // 4) * 4


@cache
def attend_specialization(
    head_dim: int,
    value_head_dim: int,
    pair: int,
    heads: int,
    lists_per_kv_head: int,
    splits: int,
    dtype: torch.dtype,
    has_cap: bool,
    sink_dtype: torch.dtype | None,
    has_counters: bool,
    has_list: bool,
    row_dtype: torch.dtype | None,
    has_mask: bool,
    is_one_block: bool,
    is_early: bool,
) -> Specialization:
    """Of `gather_attention_kernel`."""
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "DV": value_head_dim,
        "PAIR": pair,
        "BLOCK_DV": triton.next_power_of_2(value_head_dim),
        "HEADS": heads,
        "BLOCK_H": max(16, triton.next_power_of_2(heads)),
        "LISTS_PER_KV_HEAD": lists_per_kv_head,
        "BLOCK_N": block_size(max(head_dim, value_head_dim), dtype),
        "SPLITS": splits,
        "BLOCK_M": min(triton.next_power_of_2(heads * value_head_dim), 512),
        **product_constants(head_dim, dtype),
        "HAS_LIST": has_list,
        "HAS_HOT": row_dtype is not None,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
        "HAS_SINK": sink_dtype is not None,
        "HAS_COUNTERS": has_counters,
        "IS_ONE_BLOCK": is_one_block,
        "IS_EARLY": is_early,
    }
    # A list is a block or two a program; all tokens are many, and worth fetching ahead.
    num_stages = 1 if has_list else 3
    return Specialization(
        gather_attention_kernel,
        constants,
        num_warps=4,
        num_stages=num_stages,
        is_early=is_early,
    )
