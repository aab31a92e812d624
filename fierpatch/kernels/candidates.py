"""The second scoring: candidates by more bits or by their keys, and the choice among them."""

from __future__ import annotations

import triton
import triton.language as tl

from fierpatch.kernels.attention import products
from fierpatch.kernels.constants import EXPONENTS, MANTISSA_BITS, MANTISSAS, OCTAVE, ROWS, TILE_SIZE
from fierpatch.kernels.early import await_previous, start_next
from fierpatch.kernels.logits import cap
from fierpatch.kernels.scores import half_bits
from fierpatch.kernels.top_k import (
    clear_unused,
    cut_of,
    key_of,
    load_bits,
    log_sums,
    priority_of,
    slots_of,
    threshold,
)


@triton.jit
def _load_candidates(candidate_ptr, slot, num_candidates):
    """Tokens int32 ``[n]`` in these slots of a list, and which slots are used; 0 elsewhere."""
    candidate = tl.load(
        candidate_ptr + slot, mask=slot < num_candidates, other=-1, cache_modifier=".cg"
    )
    return tl.maximum(candidate, 0).to(tl.int32), candidate >= 0


@triton.jit
def _write_candidates(
    logit, is_used, slot, column, weight_ptr, most_ptr, sum_ptr, row, LIST_HEADS: tl.constexpr
):
    """Logits ``[n, columns]`` as weights of their own tile, like those of all tokens.

    Writes those with a column in ``0 .. LIST_HEADS``: weight int16 ``[row, slot, LIST_HEADS]``,
    most and sum float32 ``[row, tile, LIST_HEADS]``. An unused slot is as an invisible token.
    """
    logit = tl.where(is_used[:, None], logit, float("-inf"))
    most = tl.max(logit, axis=0)
    weight = tl.exp2(logit - tl.where(most == float("-inf"), 0.0, most)[None, :])
    tiles = tl.num_programs(0)
    is_own = (column >= 0) & (column < LIST_HEADS)
    place = (row * tiles + tl.program_id(0)) * LIST_HEADS + column
    tl.store(most_ptr + place, most, mask=is_own)
    tl.store(sum_ptr + place, tl.sum(weight, axis=0), mask=is_own)
    weight_ptr += row * (tiles * slot.shape[0] * LIST_HEADS)
    tl.store(
        weight_ptr + slot[:, None] * LIST_HEADS + column[None, :],
        half_bits(weight, logit),
        mask=is_own[None, :],
    )


@triton.jit
def _load_levels(
    codes_ptr, words_ptr, token, is_used,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """``2 b`` of tokens, as `Refinement` has it: odd numbers int8 ``[n, BLOCK_D]``.

    words are the sign bits' of each token's row of its tile, bit ``place // 32``.
    """
    PLANE: tl.constexpr = (D + 7) // 8
    byte = tl.arange(0, BLOCK_D // 8)
    channel = tl.arange(0, BLOCK_D)
    mask = is_used[:, None] & (byte < PLANE)[None, :]
    codes_ptr += token[:, None] * ((REFINE - 1) * PLANE) + byte[None, :]
    place = token % TILE_SIZE
    words_ptr += (token // TILE_SIZE * ROWS + place % ROWS)[:, None] * D + channel[None, :]
    words = tl.load(
        words_ptr, mask=is_used[:, None] & (channel < D)[None, :], other=0, cache_modifier=".cg"
    )
    level = tl.zeros([token.shape[0], BLOCK_D // 8, 8], tl.int32)
    for plane in tl.static_range(REFINE - 1):
        bits = tl.load(codes_ptr + plane * PLANE, mask=mask, other=0, cache_modifier=".cg")
        bits = bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
        level = 2 * level + (bits & 1)
    odd = 2 * tl.reshape(level, [token.shape[0], BLOCK_D]) + 1
    is_high = ((words.to(tl.int32) >> (place // ROWS)[:, None]) & 1) != 0
    return tl.where(is_high, odd, -odd).to(tl.int8)


@triton.jit(do_not_specialize=["num_lists", "num_queries", "tiles", "num_candidates"])
def code_scores_kernel(
    operand_ptr,
    unit_ptr,
    mean_ptr,
    planes_ptr,
    scale_ptr,
    codes_ptr,
    ratio_ptr,
    candidate_ptr,
    weight_ptr,
    most_ptr,
    sum_ptr,
    num_lists,
    num_queries,
    tiles,
    num_candidates,
    factor,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    REFINE: tl.constexpr,
    USUAL_RATIO: tl.constexpr,
    TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Candidates ``TILE * tile ..`` of one list by the codes: ``a (R (q / d)) . b + q . mu``.

    The query is as `query_kernel` left it for the first scoring, and `factor` is what the logits of
    this one are of those. The sums are whole numbers, as in `rotated_scores_kernel`. A row is ``(b,
    list, t)``; what is written says `_write_candidates`.
    """
    row = tl.program_id(1).to(tl.int64)
    t = row % num_queries
    list_ = row // num_queries % num_lists
    lists_per_kv_head: tl.constexpr = G // LIST_HEADS
    kv_row = row // num_queries // lists_per_kv_head
    first_head = (list_ % lists_per_kv_head * LIST_HEADS).to(tl.int32)
    block = first_head // HEADS + tl.program_id(2)
    score_row = kv_row * num_queries + t
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK_D)
    column = tl.arange(0, 2 * HEADS)
    query_slot = (score_row * BLOCKS + block) * HEADS
    operand = tl.load(
        operand_ptr + query_slot * 2 * D + column[None, :] * D + channel[:, None],
        mask=(channel < D)[:, None],
        other=0,
        cache_modifier=".cg",
    )
    unit = tl.load(unit_ptr + query_slot + head, cache_modifier=".cg")
    await_previous(IS_EARLY)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token, is_used = _load_candidates(candidate_ptr + row * num_candidates, slot, num_candidates)
    start_next(IS_EARLY)
    first_token = kv_row * tiles * TILE_SIZE
    scale = tl.load(scale_ptr + first_token + token, cache_modifier=".cg")
    ratio = tl.load(ratio_ptr + first_token + token, cache_modifier=".cg")
    mean_ptr += score_row * tiles * (TILE_SIZE // GROUP * BLOCKS * HEADS) + block * HEADS
    mean = tl.load(
        mean_ptr + (token // GROUP)[:, None] * (BLOCKS * HEADS) + head[None, :],
        mask=is_used[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    levels = _load_levels(
        codes_ptr + first_token * ((REFINE - 1) * ((D + 7) // 8)),
        planes_ptr + kv_row * tiles * (ROWS * D),
        token, is_used, D, BLOCK_D, REFINE,
    )  # fmt: skip
    sums = tl.dot(levels, operand, out_dtype=tl.int32)
    byte_worth = tl.where(tl.arange(0, 2) == 0, 256, 1)
    sums = tl.sum(tl.reshape(sums, [TILE, HEADS, 2]) * byte_worth[None, None, :], axis=2)
    exponent = (ratio.to(tl.float32) - 128.0) * (1.0 / OCTAVE)
    own = scale.to(tl.float32) * tl.exp2(exponent) * (0.5 * USUAL_RATIO)
    logit = (sums.to(tl.float32) * unit[None, :] * own[:, None] + mean) * factor
    if HAS_CAP:
        logit = cap(logit, softcap)
    _write_candidates(
        logit, is_used, slot, block * HEADS + head - first_head,
        weight_ptr, most_ptr, sum_ptr, row, LIST_HEADS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_t", "num_lists", "num_queries", "capacity",
        "num_candidates",
    ]
)  # fmt: skip
def key_scores_kernel(
    query_ptr,
    keys_ptr,
    candidate_ptr,
    weight_ptr,
    most_ptr,
    sum_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_t: tl.int64,
    num_lists,
    num_queries,
    capacity,
    num_candidates,
    logit_scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LISTS_PER_KV_HEAD: tl.constexpr,
    TILE: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """The same candidates by the keys themselves, ``q . k``; logits in units of log2."""
    row = tl.program_id(1).to(tl.int64)
    t = row % num_queries
    list_ = row // num_queries % num_lists
    b = row // num_queries // num_lists
    kv_row = row // num_queries // LISTS_PER_KV_HEAD
    head = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_D)
    query = tl.load(
        query_ptr + b * stride_b + t * stride_t
        + (list_ * LIST_HEADS + head)[:, None] * stride_h + channel[None, :],
        mask=(head < LIST_HEADS)[:, None] & (channel < D)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    await_previous(IS_EARLY)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token, is_used = _load_candidates(candidate_ptr + row * num_candidates, slot, num_candidates)
    start_next(IS_EARLY)
    keys = tl.load(
        keys_ptr + kv_row * capacity * D + token.to(tl.int64)[:, None] * D + channel[None, :],
        mask=is_used[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    logit = tl.trans(products(query, keys, SLICES, PRECISION)) * logit_scale
    if HAS_CAP:
        logit = cap(logit, softcap)
    _write_candidates(
        logit, is_used, slot, head, weight_ptr, most_ptr, sum_ptr, row, LIST_HEADS
    )


@triton.jit(
    do_not_specialize=[
        "num_lists", "num_queries", "sinks", "recent", "budget", "num_candidates", "width",
    ]
)  # fmt: skip
def refine_kernel(
    weight_ptr,
    most_ptr,
    sum_ptr,
    sink_ptr,
    candidate_ptr,
    key_ptr,
    token_index_ptr,
    num_lists,
    num_queries,
    sinks,
    recent,
    budget,
    num_candidates,
    width,
    sink_factor,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Choose a list out of its candidates: the whole selection of a row, in one program.

    Candidates ascend, so that the first of them are the sinks and the last the recents. What fits
    one block stays in registers; key is int16 ``[row, slot]``, for lists that do not.
    """
    row = tl.program_id(0).to(tl.int64)
    list_ = row // num_queries % num_lists
    candidate_ptr += row * num_candidates
    key_ptr += row * (PIECES * BLOCK)
    slot = tl.arange(0, BLOCK)
    token = tl.zeros([BLOCK], tl.int32)
    num_used = 0
    for piece in range(PIECES):
        token, is_used = _load_candidates(candidate_ptr, piece * BLOCK + slot, num_candidates)
        num_used += tl.sum(is_used.to(tl.int32), axis=0)
    await_previous(IS_EARLY)
    TILES: tl.constexpr = BLOCK // TILE
    tiles: tl.constexpr = PIECES * TILES
    weight_ptr += row * (PIECES * BLOCK * HEADS)
    most_ptr += row * (tiles * HEADS)
    sum_ptr += row * (tiles * HEADS)
    bits = load_bits(weight_ptr, 0, tiles, HEADS, HEADS, BLOCK_H, BLOCK, TILE)
    log_sum = log_sums(
        most_ptr, sum_ptr, sink_ptr, tiles, HEADS, list_ * HEADS, sink_factor,
        HEADS, BLOCK_H, BLOCK_TILES, HAS_SINK,
    )  # fmt: skip
    start_next(IS_EARLY)
    head = tl.arange(0, BLOCK_H)
    highs = tl.zeros([EXPONENTS], tl.int32)
    key = tl.zeros([BLOCK], tl.int32)
    for piece in range(PIECES):
        if PIECES > 1:
            bits = load_bits(weight_ptr, piece, tiles, HEADS, HEADS, BLOCK_H, BLOCK, TILE)
        tile = piece * TILES + tl.arange(0, TILES)
        mosts = tl.load(
            most_ptr + tile[:, None] * HEADS + head[None, :],
            mask=(head < HEADS)[None, :],
            other=float("-inf"),
        )
        weights = bits.to(tl.int32)
        priority = priority_of(weights, mosts, log_sum, TILES, HEADS, BLOCK_H, BLOCK)
        is_used = tl.max(weights, axis=1) > 0
        key = key_of(priority, is_used, piece * BLOCK + slot + 1, num_used, sinks, recent)
        if PIECES > 1:
            tl.store(key_ptr + piece * BLOCK + slot, key.to(tl.int16))
        highs += tl.histogram(key >> MANTISSA_BITS, EXPONENTS, mask=key > 0)
    high, above = threshold(highs, budget, EXPONENTS)
    lows = tl.zeros([MANTISSAS], tl.int32)
    if PIECES > 1:
        tl.debug_barrier()
    for piece in range(PIECES):
        if PIECES > 1:
            key = tl.load(key_ptr + piece * BLOCK + slot, cache_modifier=".cg").to(tl.int32)
        is_equal = (key > 0) & ((key >> MANTISSA_BITS) == high)
        lows += tl.histogram(key & (MANTISSAS - 1), MANTISSAS, mask=is_equal)
    _low, cut, num_ties, num_chosen = cut_of(high, above, lows, budget)
    token_index_ptr += row * width
    over = 0
    tied = 0
    for piece in range(PIECES):
        if PIECES > 1:
            key = tl.load(key_ptr + piece * BLOCK + slot, cache_modifier=".cg").to(tl.int32)
            token, is_used = _load_candidates(candidate_ptr, piece * BLOCK + slot, num_candidates)
        place, is_chosen, over, tied = slots_of(key, cut, num_ties, over, tied)
        is_chosen = is_chosen & (place < width)  # as it is, if the counts are right
        tl.store(token_index_ptr + place, token.to(tl.int64), mask=is_chosen)
    clear_unused(token_index_ptr, num_chosen, width, BLOCK_W)
