"""Exact selection over long rows: a radix select on 16-bit keys, in three launches.

A chunk is up to 64th of a row. Each program writes its own histogram and reads those of all chunks
of its row, so there are no atomics and nothing to clear, and the result is the same in every run:
positions ascend, and ties go to the lowest.

A key orders tokens as their priority does, the mean over the query group of softmax: its bits as
float32 without the sign and the lowest 14, so 9 bits of mantissa down to 2 ** -126. 0 is an
invisible token, 65535 one that is always attended (a sink or a recent).
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_SIZE = tl.constexpr(512)
BINS = tl.constexpr(256)
ALWAYS = tl.constexpr(65535)
PLAN = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _threshold(bins, k):
    """The highest bin such that it and those above hold k, and how many those above hold.

    Bin -1 where all together hold fewer.
    """
    index = tl.arange(0, BINS)
    at_least = tl.sum(bins, axis=0) - tl.cumsum(bins, axis=0) + bins
    bin_ = tl.sum((at_least >= k).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(index > bin_, bins, 0), axis=0)
    return bin_, above


@triton.jit
def _load_histograms(histogram_ptr, chunks, CHUNKS: tl.constexpr):
    """The histograms of the first `chunks` chunks: int32 ``[CHUNKS, BINS]``, 0 for the others."""
    chunk = tl.arange(0, CHUNKS)
    # Past the first-level cache, which does not see what other programs write.
    return tl.load(
        histogram_ptr + chunk[:, None] * BINS + tl.arange(0, BINS)[None, :],
        mask=(chunk < chunks)[:, None],
        other=0,
        cache_modifier=".cg",
    )


@triton.jit
def _is_last(arrivals_ptr, expected):
    """Whether this program is the last of `expected` to come here; leaves the count at 0."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    is_last = arrived == expected - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
    return is_last


@triton.jit
def _load_key(key_ptr, token, length):
    key = tl.load(key_ptr + token, mask=token < length, other=0)
    return key.to(tl.int32) & 0xFFFF


@triton.jit
def _log_sums(
    most_ptr, sum_ptr, sink_ptr, num_tiles, tile_stride, first_head,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_TILES: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Each head's log2-sum-exp2 over the row's tiles, beside its sink logit: ``[BLOCK_H]``."""
    head = tl.arange(0, BLOCK_H)
    within = head < HEADS
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if HAS_SINK:
        most = tl.load(sink_ptr + first_head + head, mask=within, other=0.0).to(tl.float32) * LOG2_E
        total += 1.0
    for start in range(0, num_tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        address = tile[:, None] * tile_stride + head[None, :]
        mask = (tile < num_tiles)[:, None] & within[None, :]
        mosts = tl.load(most_ptr + address, mask=mask, other=float("-inf"))
        sums = tl.load(sum_ptr + address, mask=mask, other=0.0)
        larger = tl.maximum(most, tl.max(mosts, axis=0))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(most - reference)
        total += tl.sum(sums * tl.exp2(mosts - reference[None, :]), axis=0)
        most = larger
    return tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit(do_not_specialize=["num_lists", "num_queries", "tiles", "sinks", "recent", "budget"])
def priority_kernel(
    logit_ptr,
    most_ptr,
    sum_ptr,
    sink_ptr,
    count_ptr,
    counters_ptr,
    key_ptr,
    histogram_ptr,
    plan_ptr,
    arrivals_ptr,
    num_lists,
    num_queries,
    tiles,
    sinks,
    recent,
    budget,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Keys of one chunk of a row, and the histogram of their high bytes.

    A row is ``(b, list, t)``; a list is of HEADS of the G query heads of a KV head, all or one.
    Writes key int16 ``[row, token]`` and histogram int32 ``[row, chunk, BINS]``. The last program
    of a row finds the threshold's high byte: see `compact_kernel` for the plan.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(counters_ptr).to(tl.int32)
    if chunk * (BLOCK * BLOCKS) >= length:
        return
    t = row % num_queries
    list_ = row // num_queries % num_lists
    b = row // num_queries // num_lists
    lists_per_kv_head: tl.constexpr = G // HEADS
    kv_row = b * (num_lists // lists_per_kv_head) + list_ // lists_per_kv_head
    first_head = list_ % lists_per_kv_head * HEADS
    score_row = kv_row * num_queries + t
    num_tiles = tl.cdiv(length, TILE_SIZE)
    log_sum = _log_sums(
        most_ptr + score_row * tiles * G + first_head, sum_ptr + score_row * tiles * G + first_head,
        sink_ptr, num_tiles, G, list_ * HEADS,
        HEADS, BLOCK_H, BLOCK_TILES, HAS_SINK,
    )  # fmt: skip
    head = tl.arange(0, BLOCK_H)
    if HAS_MASK:
        before = 0
        num_visible = 0
        for start in range(0, num_tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            counts = tl.load(
                count_ptr + (b * num_queries + t) * tiles + tile, mask=tile < num_tiles, other=0
            )
            num_visible += tl.sum(counts, axis=0)
            is_before = tile < chunk * (BLOCK * BLOCKS // TILE_SIZE)
            before += tl.sum(tl.where(is_before, counts, 0), axis=0)
    else:
        num_visible = length - (num_queries - 1 - t).to(tl.int32)
    logit_ptr += score_row * tiles * TILE_SIZE * G + first_head
    key_ptr += row * tiles * TILE_SIZE
    bins = tl.zeros([BINS], tl.int32)
    for i in range(0, BLOCKS):
        token = (chunk * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        logit = tl.load(
            logit_ptr + token[:, None].to(tl.int64) * G + head[None, :],
            mask=(token < length)[:, None] & (head < HEADS)[None, :],
            other=float("-inf"),
        )
        priority = tl.sum(tl.exp2(logit - log_sum[None, :]), axis=1) * (1.0 / HEADS)
        is_visible = tl.max(logit, axis=1) > float("-inf")
        if HAS_MASK:
            rank = before + tl.cumsum(is_visible.to(tl.int32), axis=0)
            before += tl.sum(is_visible.to(tl.int32), axis=0)
        else:
            rank = token + 1
        key = priority.to(tl.int32, bitcast=True) >> 14
        key = tl.minimum(tl.maximum(key, 1), ALWAYS - 1)
        key = tl.where((rank <= sinks) | (rank > num_visible - recent), ALWAYS, key)
        key = tl.where(is_visible, key, 0)
        tl.store(key_ptr + token, key.to(tl.int16), mask=token < length)
        bins += tl.histogram(key >> 8, BINS, mask=key > 0)
    histogram_ptr += row * tl.num_programs(0) * BINS
    tl.store(histogram_ptr + chunk * BINS + tl.arange(0, BINS), bins)
    chunks = tl.cdiv(length, BLOCK * BLOCKS)
    if _is_last(arrivals_ptr + row, chunks):
        all_bins = _load_histograms(histogram_ptr, chunks, CHUNKS)
        high, above = _threshold(tl.sum(all_bins, axis=0), budget)
        is_over = tl.arange(0, BINS)[None, :] > high
        each = tl.arange(0, CHUNKS)
        plan_ptr += row * (3 * CHUNKS + PLAN)
        tl.store(plan_ptr, high)
        tl.store(plan_ptr + 1, above)
        tl.store(plan_ptr + PLAN + each, tl.sum(tl.where(is_over, all_bins, 0), axis=1))


@triton.jit(do_not_specialize=["budget", "tiles"])
def low_histogram_kernel(
    key_ptr,
    histogram_ptr,
    counters_ptr,
    plan_ptr,
    arrivals_ptr,
    budget,
    tiles,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The histogram of one chunk's low bytes, of the keys whose high byte is at the threshold.

    histogram is int32 ``[row, chunk, BINS]``. The last program of a row completes its plan.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(counters_ptr).to(tl.int32)
    if chunk * (BLOCK * BLOCKS) >= length:
        return
    plan_ptr += row * (3 * CHUNKS + PLAN)
    high = tl.load(plan_ptr)
    above = tl.load(plan_ptr + 1)
    key_ptr += row * tiles * TILE_SIZE
    bins = tl.zeros([BINS], tl.int32)
    for i in range(0, BLOCKS):
        token = (chunk * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        key = _load_key(key_ptr, token, length)
        bins += tl.histogram(key & 255, BINS, mask=(key > 0) & ((key >> 8) == high))
    histogram_ptr += row * tl.num_programs(0) * BINS
    tl.store(histogram_ptr + chunk * BINS + tl.arange(0, BINS), bins)
    chunks = tl.cdiv(length, BLOCK * BLOCKS)
    if _is_last(arrivals_ptr + row, chunks):
        all_bins = _load_histograms(histogram_ptr, chunks, CHUNKS)
        low, above_low = _threshold(tl.sum(all_bins, axis=0), budget - above)
        index = tl.arange(0, BINS)[None, :]
        each = tl.arange(0, CHUNKS)
        # With fewer visible tokens than the budget there is no threshold: all of them are chosen.
        has_cut = high >= 0
        over = tl.load(plan_ptr + PLAN + each, mask=each < chunks, other=0)
        over += tl.sum(tl.where((index > low) & has_cut, all_bins, 0), axis=1)
        tied = tl.sum(tl.where(index == low, all_bins, 0), axis=1)
        tl.store(plan_ptr + 2, tl.where(has_cut, high * BINS + low, 0))
        tl.store(plan_ptr + 3, tl.where(has_cut, budget - above - above_low, 0))
        tl.store(plan_ptr + 4, tl.where(has_cut, budget, above))
        tl.store(plan_ptr + PLAN + CHUNKS + each, tl.cumsum(over, axis=0) - over)
        tl.store(plan_ptr + PLAN + 2 * CHUNKS + each, tl.cumsum(tied, axis=0) - tied)


@triton.jit(do_not_specialize=["width", "tiles"])
def compact_kernel(
    key_ptr,
    counters_ptr,
    plan_ptr,
    token_index_ptr,
    width,
    tiles,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the chosen tokens of one chunk where they belong in the row's list.

    A row's plan, int32 ``[PLAN + 3 * CHUNKS]``, is the high byte of the key at the threshold, how
    many tokens are above that, the key itself, how many of the tokens that have it are chosen, how
    many tokens are chosen in all; then for each chunk its tokens above the high byte, and how many
    tokens over the threshold and how many at it come before the chunk.
    token_index int64 ``[row, width]`` ascends; slots that a row does not fill are -1, at the end.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(counters_ptr).to(tl.int32)
    if chunk * (BLOCK * BLOCKS) >= length:
        return
    plan_ptr += row * (3 * CHUNKS + PLAN)
    cut = tl.load(plan_ptr + 2)
    num_ties = tl.load(plan_ptr + 3)
    num_chosen = tl.load(plan_ptr + 4)
    over_before = tl.load(plan_ptr + PLAN + CHUNKS + chunk)
    tied_before = tl.load(plan_ptr + PLAN + 2 * CHUNKS + chunk)
    key_ptr += row * tiles * TILE_SIZE
    token_index_ptr += row * width
    for i in range(0, BLOCKS):
        token = (chunk * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        key = _load_key(key_ptr, token, length)
        # One scan counts both: tokens over the threshold in the low half of a word, at it above.
        marks = (key > cut).to(tl.int32) + ((key == cut) & (key > 0)).to(tl.int32) * 65536
        counts = tl.cumsum(marks, axis=0)
        over = over_before + (counts & 65535)
        tied = tied_before + (counts >> 16)
        is_chosen = (key > cut) | ((key == cut) & (key > 0) & (tied <= num_ties))
        slot = over + tl.minimum(tied, num_ties) - 1
        tl.store(token_index_ptr + slot, token.to(tl.int64), mask=is_chosen)
        total = tl.sum(marks, axis=0)
        over_before += total & 65535
        tied_before += total >> 16
    if chunk == 0:
        for start in range(0, width, BLOCK_W):
            unused = start + tl.arange(0, BLOCK_W)
            empty = tl.full([BLOCK_W], -1, tl.int64)
            is_unused = (unused >= num_chosen) & (unused < width)
            tl.store(token_index_ptr + unused, empty, mask=is_unused)
