"""Selection over long rows: the largest keys, exactly, of which ties go to the lowest position.

A key orders tokens as their priority does, the mean over the query group of softmax: its exponent
and a few bits of mantissa. Only whole numbers are added up, so the result is the same in every run;
positions ascend. Each launch has one program a chunk of a row, which it reads in blocks.

A list is chosen by `EXACT` keys in three launches: keys and the row's histogram of their exponents,
the histogram of the mantissas of keys at the threshold's exponent, the list. What a histogram costs
a GPU is votes of its warps, a few for each bit, so the exponent is one and the mantissa the other.
Candidates for a second scoring are chosen by `COARSE` keys of so few bits that one histogram is
enough, in two; and so is the list out of them, in one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl

from fierpatch.kernels.constants import EXPONENTS, MANTISSA_BITS, MANTISSAS, TILE_SIZE
from fierpatch.kernels.early import await_previous, start_next
from fierpatch.kernels.scores import weight_of


@dataclass(frozen=True)
class SelectionKeys:
    """What of a float32 priority a key has: the bits from `shift` on, less those of the smallest.

    0 is an invisible token, `always` one that is attended whatever its priority (a sink or a
    recent), and 1 and ``always - 1`` all that is below and above the range.

    Args:
        shift: bits that a key leaves out.
        always: the largest key.
        lowest: exponent of the smallest priorities that are told apart; None lets the range end
            where it need not go on.
    """

    shift: int
    always: int
    lowest: int | None = None

    def smallest(self, count: int) -> int:
        """What a key of 0 would be of the float32, where the `count` largest are chosen.

        Priorities add up to 1, so that fewer than `count` are above ``1 / count``, and all of those
        are chosen: what they are is not told apart.
        """
        if self.lowest is not None:
            return _upper_bits(2.0**self.lowest, self.shift)
        return _upper_bits(1 / max(count, 1), self.shift) + 2 - self.always


@cache
def _upper_bits(number: float, shift: int) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", number))
    return int(bits) >> shift


# 6 bits of exponent, down to 2 ** -63, and 8 of mantissa.
EXACT = SelectionKeys(
    23 - MANTISSA_BITS.value, EXPONENTS.value * MANTISSAS.value - 1, 1 - EXPONENTS.value
)
# Quarters of an octave, 15 of them below 1 / count.
COARSE = SelectionKeys(21, EXPONENTS.value - 1)


@triton.jit
def threshold(bins, k, BINS: tl.constexpr):
    """The highest bin such that it and those above hold k, and how many those above hold.

    Bin -1 where all together hold fewer.
    """
    index = tl.arange(0, BINS)
    at_least = tl.sum(bins, axis=0) - tl.cumsum(bins, axis=0) + bins
    bin_ = tl.sum((at_least >= k).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(index > bin_, bins, 0), axis=0)
    return bin_, above


@triton.jit
def _load_key(key_ptr, block, is_wanted, BLOCK: tl.constexpr):
    """Keys of a block, int32: 0 past the length, as `key_kernel` leaves all of its blocks."""
    place = key_ptr + block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(place, mask=is_wanted, other=0, cache_modifier=".cg").to(tl.int32)


@triton.jit
def load_bits(
    weight_ptr, block, num_tiles,
    G: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Weights of a block's tokens as the scores left them: int16 ``[BLOCK, BLOCK_H]``.

    Whole tiles, 0 past the length: a mask by token would keep neighbours from coming together.
    """
    if HEADS == G and BLOCK_H == G:
        number = tl.arange(0, BLOCK * G)
        tile = block * (BLOCK // TILE) + number // (TILE * G)
        place = weight_ptr + block * (BLOCK * G) + number
        return tl.reshape(tl.load(place, mask=tile < num_tiles, other=0), [BLOCK, G])
    else:
        head = tl.arange(0, BLOCK_H)
        token = block * BLOCK + tl.arange(0, BLOCK)
        return tl.load(
            weight_ptr + token.to(tl.int64)[:, None] * G + head[None, :],
            mask=(token // TILE < num_tiles)[:, None] & (head < HEADS)[None, :],
            other=0,
        )


@triton.jit
def start_log_sum(
    sink_ptr, first_head, sink_factor,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """The largest logit and the sum relative to it of each head's sink alone: ``[BLOCK_H]``.

    `sink_factor` takes a sink logit to the units of log2 that the others are in.
    """
    if HAS_SINK:
        head = tl.arange(0, BLOCK_H)
        sink = tl.load(sink_ptr + first_head + head, mask=head < HEADS, other=0.0)
        return sink.to(tl.float32) * sink_factor, tl.full([BLOCK_H], 1.0, tl.float32)
    else:
        return tl.full([BLOCK_H], float("-inf"), tl.float32), tl.zeros([BLOCK_H], tl.float32)


@triton.jit
def add_tiles(mosts, sums, most, total):
    """`most` and `total` with those of some tiles ``[tiles, BLOCK_H]`` as well."""
    larger = tl.maximum(most, tl.max(mosts, axis=0))
    reference = tl.where(larger == float("-inf"), 0.0, larger)
    total = total * tl.exp2(most - reference)
    total += tl.sum(sums * tl.exp2(mosts - reference[None, :]), axis=0)
    return larger, total


@triton.jit
def end_log_sum(most, total):
    """Each head's log2-sum-exp2, 0 where there is nothing."""
    return tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def priority_of(
    bits, mosts, log_sum,
    TILES: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean over HEADS of the weights ``bits [BLOCK, BLOCK_H]`` stand for: ``[BLOCK]``.

    Those of each of its TILES tiles are relative to ``mosts [TILES, BLOCK_H]``.
    """
    factor = tl.exp2(mosts - log_sum[None, :]) * (1.0 / HEADS)
    weight = tl.reshape(weight_of(bits), [TILES, BLOCK // TILES, BLOCK_H]) * factor[:, None, :]
    return tl.reshape(tl.sum(weight, axis=2), [BLOCK])


@triton.jit
def key_of(
    priority, is_visible, rank, num_visible, sinks, recent, smallest,
    SHIFT: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    """`SelectionKeys` of tokens, the rank-th of `num_visible` from 1 on."""
    key = (priority.to(tl.int32, bitcast=True) >> SHIFT) - smallest
    key = tl.minimum(tl.maximum(key, 1), ALWAYS - 1)
    key = tl.where((rank <= sinks) | (rank > num_visible - recent), ALWAYS, key)
    return tl.where(is_visible, key, 0)


@triton.jit
def cut_of(high, above, lows, budget, BINS: tl.constexpr):
    """Where a row's keys are cut, given their bins.

    Args:
        high, above: the threshold's exponent and how many keys are above it, see `threshold`; 0
            where the bins are of whole keys.
        lows: how many keys have each mantissa beside that exponent, int32 ``[BINS]``.

    Returns:
        The threshold's mantissa, the threshold (0 where all visible tokens are chosen), how many of
        those at it are chosen, and how many in all.
    """
    low, above_low = threshold(lows, budget - above, BINS)
    # With fewer visible tokens than the budget there is no threshold: all of them are chosen.
    has_cut = (high >= 0) & (low >= 0)
    cut = tl.where(has_cut, high * BINS + low, 0)
    num_ties = tl.where(has_cut, budget - above - above_low, 0)
    return low, cut, num_ties, tl.where(has_cut, budget, above + tl.sum(lows, axis=0))


@triton.jit
def slots_of(key, cut, num_ties, over, tied):
    """Slots of a block's tokens in the list, which of them are chosen, and the counts behind it.

    `over` and `tied` are how many tokens before the block are over the threshold, and at it.
    """
    is_over = key > cut
    is_tied = (key == cut) & (key > 0)
    # One scan counts both: tokens over the threshold in the low half of a word, at it above.
    marks = is_over.to(tl.int32) + is_tied.to(tl.int32) * 65536
    counts = tl.cumsum(marks, axis=0)
    over_until = over + (counts & 65535)
    tied_until = tied + (counts >> 16)
    slot = over_until + tl.minimum(tied_until, num_ties) - 1
    total = tl.sum(marks, axis=0)
    is_chosen = is_over | (is_tied & (tied_until <= num_ties))
    return slot, is_chosen, over + (total & 65535), tied + (total >> 16)


@triton.jit
def clear_unused(token_index_ptr, num_chosen, width, BLOCK_W: tl.constexpr):
    """-1 in a row's slots that nothing is chosen for."""
    for start in range(0, width, BLOCK_W):
        unused = start + tl.arange(0, BLOCK_W)
        tl.store(token_index_ptr + unused, -1, mask=(unused >= num_chosen) & (unused < width))


@triton.jit(
    do_not_specialize=[
        "num_lists", "num_queries", "tiles", "sinks", "recent", "blocks", "smallest"
    ]
)  # fmt: skip
def key_kernel(
    weight_ptr,
    most_ptr,
    sum_ptr,
    sink_ptr,
    count_ptr,
    counters_ptr,
    key_ptr,
    high_ptr,
    chunk_low_ptr,
    num_lists,
    num_queries,
    tiles,
    sinks,
    recent,
    blocks,
    smallest,
    sink_factor,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    ALWAYS: tl.constexpr,
    IS_COARSE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Keys of one chunk of a row, int16 ``[row, token]``, with room for whole chunks.

    A row is ``(b, list, t)``; a list is of HEADS of the G query heads of a KV head, all or one.
    Adds the keys' exponents to high, int32 ``[row, EXPONENTS]``, which the scores have cleared;
    coarse keys are counted by chunk, chunk_low int32 ``[row, chunk, EXPONENTS]``.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(counters_ptr, cache_modifier=".cg").to(tl.int32)
    if (chunk > 0) and (chunk * (BLOCK * blocks) >= length):
        return
    await_previous(IS_EARLY)
    if length == 0:
        return
    TILES: tl.constexpr = BLOCK // TILE_SIZE
    t = row % num_queries
    list_ = row // num_queries % num_lists
    b = row // num_queries // num_lists
    lists_per_kv_head: tl.constexpr = G // HEADS
    kv_row = b * (num_lists // lists_per_kv_head) + list_ // lists_per_kv_head
    first_head = list_ % lists_per_kv_head * HEADS
    score_row = kv_row * num_queries + t
    num_tiles = tl.cdiv(length, TILE_SIZE)
    head = tl.arange(0, BLOCK_H)
    weight_ptr += score_row * tiles * TILE_SIZE * G + first_head
    # What takes longest to come is asked for first.
    bits = load_bits(weight_ptr, chunk * blocks, num_tiles, G, HEADS, BLOCK_H, BLOCK, TILE_SIZE)
    score_place = score_row * tiles * G + first_head
    most_ptr += score_place
    sum_ptr += score_place
    most, total = start_log_sum(sink_ptr, list_ * HEADS, sink_factor, HEADS, BLOCK_H, HAS_SINK)
    for start in range(0, num_tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < num_tiles)[:, None] & (head < HEADS)[None, :]
        mosts = tl.load(
            most_ptr + tile[:, None] * G + head[None, :], mask=mask, other=float("-inf")
        )
        sums = tl.load(sum_ptr + tile[:, None] * G + head[None, :], mask=mask, other=0.0)
        most, total = add_tiles(mosts, sums, most, total)
    log_sum = end_log_sum(most, total)
    if HAS_MASK:
        before = 0
        num_visible = 0
        for start in range(0, num_tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            counts = tl.load(
                count_ptr + (b * num_queries + t) * tiles + tile, mask=tile < num_tiles, other=0
            )
            num_visible += tl.sum(counts, axis=0)
            is_before = tile < chunk * (BLOCK * blocks // TILE_SIZE)
            before += tl.sum(tl.where(is_before, counts, 0), axis=0)
    else:
        num_visible = length - (num_queries - 1 - t).to(tl.int32)
    key_ptr += row * (tl.num_programs(0) * blocks * BLOCK)
    bin_ = tl.arange(0, EXPONENTS)
    bins = tl.zeros([EXPONENTS], tl.int32)
    for block in range(chunk * blocks, chunk * blocks + blocks):
        tile = block * TILES + tl.arange(0, TILES)
        mosts = tl.load(
            most_ptr + tile[:, None] * G + head[None, :],
            mask=(tile < num_tiles)[:, None] & (head < HEADS)[None, :],
            other=float("-inf"),
        )
        bits = bits.to(tl.int32)
        priority = priority_of(bits, mosts, log_sum, TILES, HEADS, BLOCK_H, BLOCK)
        is_visible = tl.max(bits, axis=1) > 0
        # The next block's are asked for as soon as these are used up.
        following = tl.where(block + 1 < chunk * blocks + blocks, num_tiles, 0)
        bits = load_bits(weight_ptr, block + 1, following, G, HEADS, BLOCK_H, BLOCK, TILE_SIZE)
        token = block * BLOCK + tl.arange(0, BLOCK)
        if HAS_MASK:
            rank = before + tl.cumsum(is_visible.to(tl.int32), axis=0)
            before += tl.sum(is_visible.to(tl.int32), axis=0)
        else:
            rank = token + 1
        key = key_of(
            priority, is_visible, rank, num_visible, sinks, recent, smallest, SHIFT, ALWAYS
        )
        tl.store(key_ptr + token, key.to(tl.int16))
        exponent = key if IS_COARSE else key >> MANTISSA_BITS
        bins += tl.histogram(exponent, EXPONENTS, mask=key > 0)
    if IS_COARSE:
        place = row * tl.num_programs(0) + chunk
        tl.store(chunk_low_ptr + place * EXPONENTS + bin_, bins)
    else:
        tl.atomic_add(high_ptr + row * EXPONENTS + bin_, bins, mask=bins > 0, sem="relaxed")


@triton.jit(do_not_specialize=["budget", "blocks"])
def low_kernel(
    key_ptr,
    high_ptr,
    chunk_low_ptr,
    chunk_over_ptr,
    plan_ptr,
    counters_ptr,
    budget,
    blocks,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """The keys of one chunk that are above the threshold's exponent, or have it.

    Writes chunk_over int32 ``[row, chunk]``, how many are above; chunk_low int32 ``[row, chunk,
    MANTISSAS]``, the mantissas of those that have it; plan int32 ``[row, 2]``, the exponent and how
    many keys of the row are above it.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    bin_ = tl.arange(0, MANTISSAS)
    length = tl.load(counters_ptr).to(tl.int32)
    if chunk * (BLOCK * blocks) >= length:
        return
    highs = tl.load(high_ptr + row * EXPONENTS + tl.arange(0, EXPONENTS))
    key_ptr += row * (tl.num_programs(0) * blocks * BLOCK)
    key = _load_key(key_ptr, chunk * blocks, True, BLOCK)
    place = row * tl.num_programs(0) + chunk
    chunk_low_ptr += place * MANTISSAS
    tl.store(chunk_low_ptr + bin_, tl.zeros([MANTISSAS], tl.int32))
    high, above = threshold(highs, budget, EXPONENTS)
    start_next(IS_EARLY)
    tl.debug_barrier()
    one = tl.full([BLOCK], 1, tl.int32)
    over = 0
    for block in range(chunk * blocks, chunk * blocks + blocks):
        next_key = _load_key(key_ptr, block + 1, block + 1 < chunk * blocks + blocks, BLOCK)
        is_over = (key > 0) & ((key >> MANTISSA_BITS) > high)
        is_equal = (key > 0) & ((key >> MANTISSA_BITS) == high)
        # One sum counts both.
        both = tl.sum(is_over.to(tl.int32) + is_equal.to(tl.int32) * 65536, axis=0)
        over += both & 65535
        low = key & (MANTISSAS - 1)
        # Few keys share the exponent as a rule, and those are counted one by one.
        if (both >> 16) > BLOCK // 8:
            bins = tl.histogram(low, MANTISSAS, mask=is_equal)
            tl.atomic_add(chunk_low_ptr + bin_, bins, mask=bins > 0, sem="relaxed")
        else:
            tl.atomic_add(chunk_low_ptr + low, one, mask=is_equal, sem="relaxed")
        key = next_key
    tl.store(chunk_over_ptr + place, over)
    if chunk == 0:
        tl.store(plan_ptr + row * 2, high)
        tl.store(plan_ptr + row * 2 + 1, above)


@triton.jit(do_not_specialize=["budget", "width", "blocks"])
def compact_kernel(
    key_ptr,
    high_ptr,
    chunk_low_ptr,
    chunk_over_ptr,
    plan_ptr,
    counters_ptr,
    token_index_ptr,
    budget,
    width,
    blocks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BINS: tl.constexpr,
    IS_COARSE: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Write the chosen tokens of one chunk where they belong in the row's list.

    token_index int64 or int32 ``[row, width]`` ascends; slots that a row does not fill are -1, at
    the end.
    Clears high, so that the same scores may be selected from again. Where the keys are coarse, puts
    the number of tokens chosen into plan instead.

    Starts beside `low_kernel`, and asks for its keys before it waits for what that one counts; with
    coarse keys there is nothing to start beside.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    bin_ = tl.arange(0, BINS)
    length = tl.load(counters_ptr, cache_modifier=".cg").to(tl.int32)
    if chunk * (BLOCK * blocks) >= length:
        return
    key_ptr += row * (tl.num_programs(0) * blocks * BLOCK)
    key = _load_key(key_ptr, chunk * blocks, True, BLOCK)
    high = 0
    above = 0
    if not IS_COARSE:
        await_previous(IS_EARLY)
        high = tl.load(plan_ptr + row * 2)
        above = tl.load(plan_ptr + row * 2 + 1)
    # What all chunks of the row hold, and those before this one.
    num_chunks = tl.cdiv(length, BLOCK * blocks)
    row_lows = tl.zeros([BINS], tl.int32)
    lows = tl.zeros([BINS], tl.int32)
    over = 0
    for piece in tl.static_range(PIECES):
        other = piece * CHUNKS + tl.arange(0, CHUNKS)
        place = row * tl.num_programs(0) + other
        part = tl.load(
            chunk_low_ptr + place[:, None] * BINS + bin_[None, :],
            mask=(other < num_chunks)[:, None],
            other=0,
        )
        row_lows += tl.sum(part, axis=0)
        lows += tl.sum(tl.where((other < chunk)[:, None], part, 0), axis=0)
        if not IS_COARSE:
            over += tl.sum(tl.load(chunk_over_ptr + place, mask=other < chunk, other=0), axis=0)
    low, cut, num_ties, num_chosen = cut_of(high, above, row_lows, budget, BINS)
    over += tl.sum(tl.where(bin_ > low, lows, 0), axis=0)
    tied = tl.sum(tl.where(bin_ == low, lows, 0), axis=0)
    start_next(IS_EARLY)
    token_index_ptr += row * width
    for block in range(chunk * blocks, chunk * blocks + blocks):
        token = block * BLOCK + tl.arange(0, BLOCK)
        slot, is_chosen, over, tied = slots_of(key, cut, num_ties, over, tied)
        is_chosen = is_chosen & (slot < width)  # as it is, if the counts are right
        tl.store(token_index_ptr + slot, token, mask=is_chosen)
        if block + 1 < chunk * blocks + blocks:
            key = _load_key(key_ptr, block + 1, True, BLOCK)
    if chunk == 0:
        if IS_COARSE:
            tl.store(plan_ptr + row * 2 + 1, num_chosen)
        else:
            exponent = tl.arange(0, EXPONENTS)
            tl.store(high_ptr + row * EXPONENTS + exponent, tl.zeros([EXPONENTS], tl.int32))
        clear_unused(token_index_ptr, num_chosen, width, BLOCK_W)
