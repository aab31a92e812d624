"""Where the tokens of a step lie on the device, and fetching what is missing, in a launch each."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fierpatch.hot_set import HotSet
from fierpatch.kernels.constants import (
    ASKED,
    CLOCK,
    EMPTY,
    MISSED,
    MISSING,
    NEEDED,
    NUM_COUNTS,
    OLDEST,
    PREFETCHED,
    USED,
    USEFUL,
)
from fierpatch.kernels.early import await_previous, can_start_early, start_next
from fierpatch.kernels.launch import Specialization

_AGES = OLDEST.value + 2  # from 0 to that of an empty row: a power of two
_FETCH_BLOCK = 32  # tokens that a program fetches at once
_FETCH_PROGRAMS = 12  # so few that they leave the multiprocessors to what runs beside them


@triton.jit(do_not_specialize=["width", "num_rows", "capacity"])
def place_kernel(
    token_index_ptr,
    tokens_ptr,
    stamps_ptr,
    row_of_ptr,
    tally_ptr,
    length_ptr,
    freed_ptr,
    place_ptr,
    width,
    num_rows,
    capacity,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AGES: tl.constexpr,
    IS_PREFETCH: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """`fierpatch.hot_set.place` for one list; freed int32 ``[lists, width]`` is for its own use.

    Who leaves is found by counting ages: all above one age, and of that age the lowest rows.
    """
    list_ = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_R)
    tokens_ptr += list_ * num_rows
    stamps_ptr += list_ * num_rows
    row_of_ptr += list_ * capacity
    tally_ptr += list_ * NUM_COUNTS
    freed_ptr += list_ * width
    step = tl.load(tally_ptr + CLOCK) + (0 if IS_PREFETCH else 1)
    now = (2 * step + (0 if IS_PREFETCH else 1)).to(tl.int32)
    held = tl.load(tokens_ptr + row, mask=row < num_rows, other=0)
    await_previous(IS_EARLY)
    start_next(IS_EARLY)
    token = tl.load(token_index_ptr + list_ * width + slot, mask=slot < width, other=EMPTY)
    is_used = token >= 0
    if IS_PREFETCH:
        # What is not stored yet would be another token's row when it is.
        is_used = is_used & (token < tl.load(length_ptr))
    found = tl.load(row_of_ptr + token, mask=is_used, other=EMPTY).to(tl.int32)
    is_hit = is_used & (found >= 0)
    before = tl.load(stamps_ptr + found, mask=is_hit, other=1)
    if IS_PREFETCH:
        tl.store(stamps_ptr + found, tl.maximum(before, now), mask=is_hit)
    else:
        # Without a wait for what was there, which only the tally counts.
        tl.store(stamps_ptr + found, tl.zeros([BLOCK_K], tl.int32) + now, mask=is_hit)
    tl.debug_barrier()
    stamp = tl.load(stamps_ptr + row, mask=row < num_rows, other=0)

    age = tl.minimum(tl.maximum(now - stamp, 0), OLDEST)
    age = tl.where(held == EMPTY, OLDEST + 1, age)
    age = tl.where(row < num_rows, age, 0)
    is_missing = is_used & (found < 0)
    missing = is_missing.to(tl.int32)
    rank = tl.cumsum(missing, 0) - missing
    if IS_PREFETCH:
        is_missing = is_missing & (rank < tl.sum((age > 0).to(tl.int32)))
        missing = is_missing.to(tl.int32)
    num_missing = tl.sum(missing)
    counts = tl.histogram(age, AGES)
    ages = tl.arange(0, AGES)
    older = tl.sum(counts) - tl.cumsum(counts, 0)  # than each age
    last = tl.max(tl.where((older + counts >= num_missing) & (ages > 0), ages, 0))
    of_last = num_missing - tl.sum(tl.where(ages == last, older, 0))
    # Two counts in one pass: rows so far that are older, and those of the last age.
    is_older, is_last = age > last, age == last
    if BLOCK_R < 32768:
        so_far = tl.cumsum((is_older.to(tl.int32) << 16) + is_last.to(tl.int32), 0)
        older_so_far, last_so_far = so_far >> 16, so_far & 0xFFFF
    else:
        older_so_far = tl.cumsum(is_older.to(tl.int32), 0)
        last_so_far = tl.cumsum(is_last.to(tl.int32), 0)
    leaves = (is_older | (is_last & (last_so_far <= of_last))) & (age > 0) & (num_missing > 0)
    place_of_free = older_so_far + tl.minimum(last_so_far, of_last) - 1
    tl.store(freed_ptr + place_of_free, row, mask=leaves)
    tl.debug_barrier()
    new = tl.load(freed_ptr + rank, mask=is_missing, other=0)
    old = tl.load(tokens_ptr + new, mask=is_missing, other=EMPTY)
    tl.store(row_of_ptr + old, tl.full([BLOCK_K], EMPTY, tl.int32), mask=is_missing & (old >= 0))
    tl.store(row_of_ptr + token, new, mask=is_missing)
    tl.store(stamps_ptr + new, tl.zeros([BLOCK_K], tl.int32) + now, mask=is_missing)
    # Not before all have read who was there.
    tl.debug_barrier()
    tl.store(tokens_ptr + new, token.to(tl.int32), mask=is_missing)
    lies = tl.where(is_missing, new + MISSING, tl.where(is_used, found, EMPTY))
    tl.store(place_ptr + list_ * width + slot, lies, mask=slot < width)
    if IS_PREFETCH:
        tl.store(tally_ptr + PREFETCHED, tl.load(tally_ptr + PREFETCHED) + num_missing)
        tl.store(tally_ptr + ASKED, tl.load(tally_ptr + ASKED) + tl.sum(is_used.to(tl.int32)))
    else:
        used, missed = tl.load(tally_ptr + USED), tl.load(tally_ptr + MISSED)
        useful = tl.sum((is_hit & (before % 2 == 0)).to(tl.int32))
        tl.store(tally_ptr + CLOCK, step)
        tl.store(tally_ptr + USED, used + tl.sum(is_used.to(tl.int32)))
        tl.store(tally_ptr + MISSED, missed + num_missing)
        tl.store(tally_ptr + USEFUL, tl.load(tally_ptr + USEFUL) + useful)
        tl.store(tally_ptr + NEEDED, (num_missing + useful).to(tl.int64))


@triton.jit(do_not_specialize=["num_lists", "least"])
def lengths_kernel(tally_ptr, counters_ptr, lengths_ptr, num_lists, least, BLOCK: tl.constexpr):
    """See `lengths_ahead`."""
    list_ = tl.arange(0, BLOCK)
    needed_ptr = tally_ptr + list_ * NUM_COUNTS + NEEDED
    needed = tl.sum(tl.load(needed_ptr, mask=list_ < num_lists, other=0))
    stored = tl.where(needed >= least, tl.load(counters_ptr), 0)
    tl.store(lengths_ptr, tl.maximum(stored, 1))
    tl.store(lengths_ptr + 2, stored)


@triton.jit
def _asked(place_ptr, token_index_ptr, task, tasks, blocks, slot, width):
    """Where the tokens of one block of a list lie, and which they are."""
    slot += task % blocks * slot.shape[0]
    offset = (task // blocks).to(tl.int64) * width + slot
    mask = (slot < width) & (task < tasks)
    lies = tl.load(place_ptr + offset, mask=mask, other=EMPTY)
    return lies, tl.load(token_index_ptr + offset, mask=mask, other=0)


@triton.jit(do_not_specialize=["num_lists", "num_kv_rows", "width", "num_rows"])
def fetch_kernel(
    rows_ptr,
    place_ptr,
    token_index_ptr,
    hot_ptr,
    num_lists,
    num_kv_rows,
    width,
    num_rows,
    PAIR: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LISTS_PER_KV_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copy what is marked as missing from paired rows to the hot ones, by a few programs."""
    channel = tl.arange(0, BLOCK_W)
    slot = tl.arange(0, BLOCK_N)
    blocks = tl.cdiv(width, BLOCK_N)
    tasks, step = num_lists * blocks, tl.num_programs(0)
    first = tl.program_id(0)
    lies, token = _asked(place_ptr, token_index_ptr, first, tasks, blocks, slot, width)
    for task in range(first, tasks, step):
        # What is to be fetched next is read while this is on its way.
        next_lies, next_token = _asked(
            place_ptr, token_index_ptr, task + step, tasks, blocks, slot, width
        )
        list_ = (task // blocks).to(tl.int64)
        mask = (lies >= MISSING)[:, None] & (channel < PAIR)[None, :]
        source_ptr = rows_ptr + (token * num_kv_rows + list_ // LISTS_PER_KV_HEAD) * PAIR
        rows = tl.load(source_ptr[:, None] + channel[None, :], mask=mask, other=0.0)
        target_ptr = hot_ptr + (list_ * num_rows + lies % MISSING) * PAIR
        tl.store(target_ptr[:, None] + channel[None, :], rows, mask=mask)
        lies, token = next_lies, next_token


def lengths_ahead(hot: HotSet, width: int, counters: Tensor) -> tuple[Tensor, Tensor]:
    """How far to select ahead, and up to where to place: int64 ``[1]`` each.

    Up to the tokens stored if the last step needed enough, else to none; a selection wants one.

    Args:
        width: K of the lists.
        counters: the layer's.
    """
    lengths = counters.new_empty(4)  # one at each address that kernels take to be aligned
    num_lists = hot.tally.shape[:2].numel()
    lengths_specialization(num_lists).launch(
        (1, 1, 1), hot.tally, counters, lengths, num_lists, hot.least_needed(width)
    )
    return lengths[:1], lengths[2:3]


def place(hot: HotSet, token_indices: Tensor, length: Tensor | None = None) -> Tensor:
    """See `fierpatch.hot_set.place`; token_indices int64 and contiguous.

    Args:
        length: for a prefetch, int64 ``[1]``: only tokens before it are placed.
    """
    is_prefetch = length is not None
    batch_size, num_lists, _, width = token_indices.shape
    num_rows, capacity = hot.tokens.shape[2], hot.row_of.shape[2]
    room = token_indices.new_empty((2, *token_indices.shape), dtype=torch.int32)
    is_early = not is_prefetch and can_start_early(token_indices.device)
    place_specialization(width, num_rows, hot.row_of.dtype, is_prefetch, is_early).launch(
        (batch_size * num_lists, 1, 1),
        token_indices, hot.tokens, hot.stamps, hot.row_of, hot.tally, length,
        room[0], room[1],
        width, num_rows, capacity,
    )  # fmt: skip
    return room[1]


def fetch(hot: HotSet, places: Tensor, token_indices: Tensor, paired: Tensor) -> None:
    """Copy what `place` marked as missing out of paired rows ``[C, B, H, D + Dv]``."""
    batch_size, num_lists, _, width = token_indices.shape
    num_heads, pair = paired.shape[2:]
    fetch_specialization(pair, num_lists // num_heads, paired.dtype).launch(
        (_FETCH_PROGRAMS, 1, 1),
        paired, places, token_indices, hot.rows,
        batch_size * num_lists, batch_size * num_heads, width, hot.rows.shape[2],
    )  # fmt: skip


@cache
def lengths_specialization(num_lists: int) -> Specialization:
    """Of `lengths_kernel`."""
    return Specialization(lengths_kernel, {"BLOCK": triton.next_power_of_2(num_lists)}, num_warps=1)


@cache
def place_specialization(
    width: int, num_rows: int, dtype: torch.dtype, is_prefetch: bool, is_early: bool
) -> Specialization:
    """Of `place_kernel`."""
    constants = {
        "BLOCK_K": triton.next_power_of_2(width),
        "BLOCK_R": triton.next_power_of_2(num_rows),
        "AGES": _AGES,
        "IS_PREFETCH": is_prefetch,
        "IS_EARLY": is_early,
    }
    num_warps = min(max(constants["BLOCK_R"] // 128, 4), 32)
    return Specialization(place_kernel, constants, num_warps=num_warps, is_early=is_early)


@cache
def fetch_specialization(pair: int, lists_per_kv_head: int, dtype: torch.dtype) -> Specialization:
    """Of `fetch_kernel`."""
    constants = {
        "PAIR": pair,
        "BLOCK_W": triton.next_power_of_2(pair),
        "LISTS_PER_KV_HEAD": lists_per_kv_head,
        "BLOCK_N": _FETCH_BLOCK,
    }
    return Specialization(fetch_kernel, constants, num_warps=16)
