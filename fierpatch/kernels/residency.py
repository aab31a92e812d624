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
_FETCH_PROGRAMS = 8  # so few that they leave the multiprocessors to what runs beside them


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
    left_ptr,
    width,
    num_rows,
    capacity,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AGES: tl.constexpr,
    IS_PREFETCH: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """`fierpatch.hot_set.place` for one list, but that no token's row is changed in row_of.

    Who leaves is found by counting ages: all above one age, and of that age the lowest rows.

    Writes place int32 ``[lists, width]`` and left, alike: the token that leaves the row which one
    that is missing takes, EMPTY elsewhere. freed, alike, is for its own use. A prefetch of which
    none is to be placed writes nothing.
    """
    list_ = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_R)
    if IS_PREFETCH:
        length = tl.load(length_ptr)
        if length == 0:
            return
    tokens_ptr += list_ * num_rows
    stamps_ptr += list_ * num_rows
    row_of_ptr += list_ * capacity
    tally_ptr += list_ * NUM_COUNTS
    freed_ptr += list_ * width
    step = tl.load(tally_ptr + CLOCK) + (0 if IS_PREFETCH else 1)
    now = (2 * step + (0 if IS_PREFETCH else 1)).to(tl.int32)
    # All that no kernel writes meanwhile is asked for before the wait.
    held = tl.load(tokens_ptr + row, mask=row < num_rows, other=0)
    if IS_PREFETCH:
        counted, asked = tl.load(tally_ptr + PREFETCHED), tl.load(tally_ptr + ASKED)
    else:
        counted, asked = tl.load(tally_ptr + MISSED), tl.load(tally_ptr + USED)
        useful = tl.load(tally_ptr + USEFUL)
    await_previous(IS_EARLY)
    start_next(IS_EARLY)
    token = tl.load(token_index_ptr + list_ * width + slot, mask=slot < width, other=EMPTY)
    is_used = (token >= 0) & (token < capacity)
    if IS_PREFETCH:
        # What is not stored yet would be another token's row when it is.
        is_used = is_used & (token < length)
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
    counts = tl.histogram(age, AGES)
    ages = tl.arange(0, AGES)
    older = BLOCK_R - tl.cumsum(counts, 0)  # than each age
    is_missing = is_used & (found < 0)
    missing = is_missing.to(tl.int32)
    rank = tl.cumsum(missing, 0) - missing
    if IS_PREFETCH:
        is_missing = is_missing & (rank < tl.sum(tl.where(ages == 0, older, 0)))
    # Three counts in one sum, of up to 2^20 each.
    marks = is_missing.to(tl.int64) + (is_used.to(tl.int64) << 21)
    marks = tl.sum(marks + ((is_hit & (before % 2 == 0)).to(tl.int64) << 42))
    num_missing = (marks & 0x1FFFFF).to(tl.int32)
    num_used, num_useful = (marks >> 21) & 0x1FFFFF, marks >> 42
    # The age of the last to leave, and how many are older, in one maximum.
    reaches = (older + counts >= num_missing) & (ages > 0)
    both = tl.max(tl.where(reaches, (ages << 21) + older, 0))
    last, of_last = both >> 21, num_missing - (both & 0x1FFFFF)
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
    tl.store(tokens_ptr + new, token.to(tl.int32), mask=is_missing)
    tl.store(stamps_ptr + new, tl.zeros([BLOCK_K], tl.int32) + now, mask=is_missing)
    place = tl.where(is_missing, new + MISSING, tl.where(is_used, found, EMPTY))
    tl.store(place_ptr + list_ * width + slot, place, mask=slot < width)
    tl.store(left_ptr + list_ * width + slot, old, mask=slot < width)
    if IS_PREFETCH:
        tl.store(tally_ptr + PREFETCHED, counted + num_missing)
        tl.store(tally_ptr + ASKED, asked + num_used)
    else:
        tl.store(tally_ptr + CLOCK, step)
        tl.store(tally_ptr + USED, asked + num_used)
        tl.store(tally_ptr + MISSED, counted + num_missing)
        tl.store(tally_ptr + USEFUL, useful + num_useful)
        tl.store(tally_ptr + NEEDED, num_missing + num_useful)


@triton.jit(do_not_specialize=["num_lists", "least", "shortest"])
def lengths_kernel(
    tally_ptr, counters_ptr, lengths_ptr, num_lists, least, shortest, BLOCK: tl.constexpr
):
    """See `lengths_ahead`."""
    list_ = tl.arange(0, BLOCK)
    needed_ptr = tally_ptr + list_ * NUM_COUNTS + NEEDED
    needed = tl.sum(tl.load(needed_ptr, mask=list_ < num_lists, other=0))
    stored = tl.where(needed >= least, tl.load(counters_ptr), 0)
    tl.store(lengths_ptr, tl.maximum(stored, shortest))
    tl.store(lengths_ptr + 2, stored)


@triton.jit
def settle(row_of_ptr, token, place, left, is_missing):
    """Note where tokens that were missing lie from now on, and that others have left."""
    tl.store(row_of_ptr + left, tl.full(left.shape, EMPTY, tl.int32), mask=is_missing & (left >= 0))
    tl.store(row_of_ptr + token, place - MISSING, mask=is_missing)


@triton.jit
def _asked(place_ptr, left_ptr, token_index_ptr, task, tasks, blocks, slot, width):
    """Where the tokens of one block of a list lie, who left for them, and which they are."""
    slot += task % blocks * slot.shape[0]
    offset = (task // blocks).to(tl.int64) * width + slot
    mask = (slot < width) & (task < tasks)
    place = tl.load(place_ptr + offset, mask=mask, other=EMPTY)
    left = tl.load(left_ptr + offset, mask=mask, other=EMPTY)
    return place, left, tl.load(token_index_ptr + offset, mask=mask, other=0)


@triton.jit(do_not_specialize=["num_lists", "num_kv_rows", "width", "num_rows", "capacity"])
def fetch_kernel(
    rows_ptr,
    place_ptr,
    left_ptr,
    token_index_ptr,
    hot_ptr,
    row_of_ptr,
    length_ptr,
    num_lists,
    num_kv_rows,
    width,
    num_rows,
    capacity,
    PAIR: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LISTS_PER_KV_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copy what is marked as missing from paired rows to the hot ones, by a few programs."""
    if tl.load(length_ptr) == 0:
        return
    channel = tl.arange(0, BLOCK_W)
    slot = tl.arange(0, BLOCK_N)
    blocks = tl.cdiv(width, BLOCK_N)
    tasks, step = num_lists * blocks, tl.num_programs(0)
    first = tl.program_id(0)
    place, left, token = _asked(
        place_ptr, left_ptr, token_index_ptr, first, tasks, blocks, slot, width
    )
    for task in range(first, tasks, step):
        # What is to be fetched next is read while this is on its way.
        next_place, next_left, next_token = _asked(
            place_ptr, left_ptr, token_index_ptr, task + step, tasks, blocks, slot, width
        )
        list_ = (task // blocks).to(tl.int64)
        is_missing = place >= MISSING
        mask = is_missing[:, None] & (channel < PAIR)[None, :]
        source_ptr = rows_ptr + (token * num_kv_rows + list_ // LISTS_PER_KV_HEAD) * PAIR
        rows = tl.load(source_ptr[:, None] + channel[None, :], mask=mask, other=0.0)
        target_ptr = hot_ptr + (list_ * num_rows + place % MISSING) * PAIR
        tl.store(target_ptr[:, None] + channel[None, :], rows, mask=mask)
        settle(row_of_ptr + list_ * capacity, token, place, left, is_missing)
        place, left, token = next_place, next_left, next_token


def lengths_ahead(
    hot: HotSet, width: int, counters: Tensor, lengths: Tensor, *, shortest: int
) -> tuple[Tensor, Tensor]:
    """How far to select ahead, and up to where to place: int64 ``[1]`` each.

    To the tokens stored if the last step needed enough, else nowhere.

    Args:
        width: K of the lists.
        counters: the layer's.
        lengths: room for both, int64 ``[4]``: one at each address that kernels take to be aligned.
        shortest: of lengths to select ahead, where a selection of none will not do.
    """
    num_lists = hot.tally.shape[:2].numel()
    lengths_specialization(num_lists).launch(
        (1, 1, 1), hot.tally, counters, lengths, num_lists, hot.least_needed(width), shortest
    )
    return lengths[:1], lengths[2:3]


def place(hot: HotSet, token_indices: Tensor, length: Tensor | None = None) -> Tensor:
    """Decide about rows as `fierpatch.hot_set.place` does; token_indices int64 and contiguous.

    Until what is missing has been fetched, no token's row is changed in ``hot.row_of``, so that
    what reads rows there may run beside this. An attention, or `fetch`, has to come next.

    Args:
        length: for a prefetch, int64 ``[1]``: only tokens before it are placed.

    Returns:
        int32 ``[2, B, L, 1, K]``: the places, and the tokens that left for those which are missing,
        EMPTY where there are none. Of a prefetch of length 0 it is not written.
    """
    is_prefetch = length is not None
    batch_size, num_lists, _, width = token_indices.shape
    num_rows, capacity = hot.tokens.shape[2], hot.row_of.shape[2]
    room = token_indices.new_empty((3, *token_indices.shape), dtype=torch.int32)
    is_early = not is_prefetch and can_start_early(token_indices.device)
    place_specialization(width, num_rows, hot.row_of.dtype, is_prefetch, is_early).launch(
        (batch_size * num_lists, 1, 1),
        token_indices, hot.tokens, hot.stamps, hot.row_of, hot.tally, length,
        room[2], room[0], room[1],
        width, num_rows, capacity,
    )  # fmt: skip
    return room[:2]


def fetch(
    hot: HotSet, placed: Tensor, token_indices: Tensor, length: Tensor, paired: Tensor
) -> None:
    """Copy what `place` marked as missing out of paired rows ``[C, B, H, D + Dv]``.

    Args:
        placed, token_indices, length: what `place` gave, and was given for a prefetch.
    """
    batch_size, num_lists, _, width = token_indices.shape
    num_heads, pair = paired.shape[2:]
    fetch_specialization(pair, num_lists // num_heads, paired.dtype, hot.row_of.dtype).launch(
        (_FETCH_PROGRAMS, 1, 1),
        paired, placed[0], placed[1], token_indices, hot.rows, hot.row_of, length,
        batch_size * num_lists, batch_size * num_heads, width, hot.rows.shape[2],
        hot.row_of.shape[2],
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
    num_warps = min(max(constants["BLOCK_R"] // 128, 4), 16 if num_rows <= 4096 else 32)
    return Specialization(place_kernel, constants, num_warps=num_warps, is_early=is_early)


@cache
def fetch_specialization(
    pair: int, lists_per_kv_head: int, dtype: torch.dtype, row_dtype: torch.dtype
) -> Specialization:
    """Of `fetch_kernel`."""
    constants = {
        "PAIR": pair,
        "BLOCK_W": triton.next_power_of_2(pair),
        "LISTS_PER_KV_HEAD": lists_per_kv_head,
        "BLOCK_N": _FETCH_BLOCK,
    }
    return Specialization(fetch_kernel, constants, num_warps=16)
