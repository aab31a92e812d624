"""The second scoring: candidates by more bits or by their keys, and the choice among them."""

from __future__ import annotations

import triton
import triton.language as tl

from fierpatch.kernels.attention_block import products
from fierpatch.kernels.constants import EXPONENTS, HALF, ROWS, TILE_SIZE
from fierpatch.kernels.early import await_previous, start_next
from fierpatch.kernels.logits import cap
from fierpatch.kernels.scores import half_bits
from fierpatch.kernels.top_k import (
    add_tiles,
    clear_unused,
    cut_of,
    end_log_sum,
    key_of,
    load_bits,
    priority_of,
    slots_of,
    start_log_sum,
)


@triton.jit
def _load_candidates(candidate_ptr, slot, num_candidates):
    """Tokens int32 ``[n]`` in these slots of a list, and which slots are used.

    Others have token 0, which may be read as well.
    """
    candidate = tl.load(
        candidate_ptr + slot, mask=slot < num_candidates, other=-1, cache_modifier=".cg"
    )
    return tl.maximum(candidate, 0), candidate >= 0


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
def _spread(nibbles):
    """The four bits of whole numbers as a byte each: of channels 0, 2, 1, 3, the lowest first.

    Multiplied, a bit comes to stand 0, 6, 15 and 21 higher, and no two meet.
    """
    return ((nibbles & 15) * 0x208041) & 0x01010101


@triton.jit
def _add_plane(words, bytes_):
    """Twice the packed bytes ``words [n, 2 k]``, plus a plane of bits ``[n, k]``."""
    wide = bytes_.to(tl.int32)
    spread = tl.join(_spread(wide), _spread(wide >> 4))
    return 2 * words + tl.reshape(spread, [words.shape[0], words.shape[1]])


@triton.jit
def _bytes_of(words):
    """Packed bytes ``[n, k]`` as int8 ``[n, 4 k]``, the lowest first."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [words.shape[0], 4 * words.shape[1]])


@triton.jit(do_not_specialize=["num_lists", "num_queries", "tiles", "num_candidates"])
def code_scores_kernel(
    operand_ptr,
    total_ptr,
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
    CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Candidates ``TILE * tile ..`` of one list by the codes: ``a (R (q / d)) . b + q . mu``.

    The query is as `query_kernel` left it, its channels in the order of packed codes, and `factor`
    is what the logits of this scoring are of those of the first. A token's sign is bit ``place //
    32`` of row ``place % 32`` of its tile's words. The sums are whole numbers, as in
    `rotated_scores_kernel`. A row is ``(b, list, t)``; what is written says `_write_candidates`.
    """
    row = tl.program_id(1).to(tl.int64)
    t = row % num_queries
    list_ = row // num_queries % num_lists
    lists_per_kv_head: tl.constexpr = G // LIST_HEADS
    kv_row = row // num_queries // lists_per_kv_head
    first_head = (list_ % lists_per_kv_head * LIST_HEADS).to(tl.int32)
    block = first_head // HEADS + tl.program_id(2)
    score_row = kv_row * num_queries + t
    PLANE: tl.constexpr = (D + 7) // 8
    head = tl.arange(0, HEADS)
    part = tl.arange(0, BLOCK_C)
    column = tl.arange(0, 2 * HEADS)
    channel = tl.arange(0, BLOCK_D)
    pair = tl.arange(0, BLOCK_D // 2)
    byte = tl.arange(0, BLOCK_D // 8)
    query_slot = (score_row * BLOCKS + block) * HEADS
    operand = tl.load(
        operand_ptr + query_slot * 2 * D + column[None, :] * D + channel[:, None],
        mask=(channel < D)[:, None],
        other=0,
        cache_modifier=".cg",
    )
    totals = tl.load(
        total_ptr + (query_slot + head)[:, None] * CHANNEL_BLOCKS + part[None, :],
        mask=(part < CHANNEL_BLOCKS)[None, :],
        other=0,
        cache_modifier=".cg",
    )
    unit = tl.load(unit_ptr + query_slot + head, cache_modifier=".cg") * (0.5 * USUAL_RATIO)
    await_previous(IS_EARLY)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token, is_used = _load_candidates(candidate_ptr + row * num_candidates, slot, num_candidates)
    start_next(IS_EARLY)
    first_token = kv_row * tiles * TILE_SIZE
    place = token % TILE_SIZE
    planes_ptr = (planes_ptr + kv_row * tiles * (ROWS * D)).to(tl.pointer_type(tl.int32))
    pairs = tl.load(
        planes_ptr + (token // TILE_SIZE * ROWS + place % ROWS)[:, None] * (D // 2) + pair[None, :],
        mask=(pair < D // 2)[None, :],
        other=0,
        cache_modifier=".cg",
    )
    codes_ptr += (first_token + token)[:, None] * ((REFINE - 1) * PLANE) + byte[None, :]
    mask = (byte < PLANE)[None, :]
    first = tl.load(codes_ptr, mask=mask, other=0, cache_modifier=".cg")
    second = first
    third = first
    if REFINE > 2:
        second = tl.load(codes_ptr + PLANE, mask=mask, other=0, cache_modifier=".cg")
    if REFINE > 3:
        third = tl.load(codes_ptr + 2 * PLANE, mask=mask, other=0, cache_modifier=".cg")
    scale = tl.load(scale_ptr + first_token + token, cache_modifier=".cg")
    ratio = tl.load(ratio_ptr + first_token + token, cache_modifier=".cg")
    mean_ptr += score_row * tiles * (TILE_SIZE // GROUP * BLOCKS * HEADS) + block * HEADS
    mean = tl.load(
        mean_ptr + (token // GROUP)[:, None] * (BLOCKS * HEADS) + head[None, :],
        cache_modifier=".cg",
    )
    # Codes as packed bytes, four channels in a word: the sign, then a plane at a time.
    signs = (pairs >> (place // ROWS)[:, None]) & 0x00010001
    low, high = tl.split(tl.reshape(signs, [TILE, BLOCK_D // 4, 2]))
    words = _add_plane(low + (high << 8), first)
    if REFINE > 2:
        words = _add_plane(words, second)
    if REFINE > 3:
        words = _add_plane(words, third)
    sums = tl.dot(_bytes_of(words), operand, out_dtype=tl.int32)
    byte_worth = tl.where(tl.arange(0, 2) == 0, 256, 1)
    sums = tl.sum(tl.reshape(sums, [TILE, HEADS, 2]) * byte_worth[None, None, :], axis=2)
    # Twice b: codes count up from the lowest level.
    sums = 2 * sums - tl.sum(totals, axis=1)[None, :] * ((1 << REFINE) - 1)
    upper_half = (ratio.to(tl.int32) + HALF) << 16
    own = scale.to(tl.float32) * upper_half.to(tl.float32, bitcast=True)
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
        mask=(channel < D)[None, :],
        other=0.0,
    )
    logit = tl.trans(products(query, keys, SLICES, PRECISION)) * logit_scale
    if HAS_CAP:
        logit = cap(logit, softcap)
    _write_candidates(logit, is_used, slot, head, weight_ptr, most_ptr, sum_ptr, row, LIST_HEADS)


@triton.jit(
    do_not_specialize=[
        "num_lists", "num_queries", "sinks", "recent", "smallest", "budget", "num_candidates",
        "width",
    ]
)  # fmt: skip
def refine_kernel(
    weight_ptr,
    most_ptr,
    sum_ptr,
    sink_ptr,
    candidate_ptr,
    plan_ptr,
    key_ptr,
    token_index_ptr,
    num_lists,
    num_queries,
    sinks,
    recent,
    smallest,
    budget,
    num_candidates,
    width,
    sink_factor,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SHIFT: tl.constexpr,
    ALWAYS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Choose a list out of its candidates: the whole selection of a row, in one program.

    Candidates ascend, so that the first of them are the sinks and the last the recents. What fits
    one block stays in registers; key is int16 ``[row, slot]``, for lists that do not.
    """
    row = tl.program_id(0).to(tl.int64)
    list_ = row // num_queries % num_lists
    TILES: tl.constexpr = BLOCK // TILE
    tiles: tl.constexpr = PIECES * TILES
    candidate_ptr += row * num_candidates
    key_ptr += row * (PIECES * BLOCK)
    token_index_ptr += row * width
    weight_ptr += row * (PIECES * BLOCK * HEADS)
    most_ptr += row * (tiles * HEADS)
    sum_ptr += row * (tiles * HEADS)
    slot = tl.arange(0, BLOCK)
    token, _is_used = _load_candidates(candidate_ptr, slot, num_candidates)
    num_used = tl.load(plan_ptr + row * 2 + 1, cache_modifier=".cg")
    await_previous(IS_EARLY)
    bits = load_bits(weight_ptr, 0, tiles, HEADS, HEADS, BLOCK_H, BLOCK, TILE)
    head = tl.arange(0, BLOCK_H)
    tile = tl.arange(0, TILES)[:, None]
    own = (head < HEADS)[None, :]
    mosts = tl.load(most_ptr + tile * HEADS + head[None, :], mask=own, other=float("-inf"))
    sums = tl.load(sum_ptr + tile * HEADS + head[None, :], mask=own, other=0.0)
    most, total = start_log_sum(sink_ptr, list_ * HEADS, sink_factor, HEADS, BLOCK_H, HAS_SINK)
    most, total = add_tiles(mosts, sums, most, total)
    for piece in range(1, PIECES):
        place = (piece * TILES + tile) * HEADS + head[None, :]
        others = tl.load(most_ptr + place, mask=own, other=float("-inf"))
        sums = tl.load(sum_ptr + place, mask=own, other=0.0)
        most, total = add_tiles(others, sums, most, total)
    log_sum = end_log_sum(most, total)
    start_next(IS_EARLY)
    key = tl.zeros([BLOCK], tl.int32)
    bins = tl.zeros([EXPONENTS], tl.int32)
    for piece in range(PIECES):
        if PIECES > 1:
            bits = load_bits(weight_ptr, piece, tiles, HEADS, HEADS, BLOCK_H, BLOCK, TILE)
            place = (piece * TILES + tile) * HEADS + head[None, :]
            mosts = tl.load(most_ptr + place, mask=own, other=float("-inf"))
        priority = priority_of(bits.to(tl.int32), mosts, log_sum, TILES, HEADS, BLOCK_H, BLOCK)
        place = piece * BLOCK + slot
        key = key_of(
            priority, place < num_used, place + 1, num_used, sinks, recent, smallest, SHIFT, ALWAYS
        )
        if PIECES > 1:
            tl.store(key_ptr + place, key.to(tl.int16))
        bins += tl.histogram(key, EXPONENTS, mask=key > 0)
    _low, cut, num_ties, num_chosen = cut_of(0, 0, bins, budget, EXPONENTS)
    if PIECES > 1:
        tl.debug_barrier()
    over = 0
    tied = 0
    for piece in range(PIECES):
        if PIECES > 1:
            place = piece * BLOCK + slot
            key = tl.load(key_ptr + place, cache_modifier=".cg").to(tl.int32)
            token, _is_used = _load_candidates(candidate_ptr, place, num_candidates)
        place, is_chosen, over, tied = slots_of(key, cut, num_ties, over, tied)
        is_chosen = is_chosen & (place < width)  # as it is, if the counts are right
        tl.store(token_index_ptr + place, token, mask=is_chosen)
    clear_unused(token_index_ptr, num_chosen, width, BLOCK_W)
