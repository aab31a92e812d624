"""Scores of every token by the bit planes of an index, and each head's softmax statistics.

A program scores one tile of 512 tokens for up to 8 query heads of a KV head. Logits are in units of
log2, so that ``exp2`` turns them into weights; 0 weight is -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fierpatch.kernels.constants import BINS, LOG2_E, ROWS, TILE_SIZE
from fierpatch.kernels.query import load_query


@triton.jit
def cap(logit, softcap):
    """``softcap * tanh(logit)`` in units of log2, where the logit is already over softcap."""
    # tanh by exp2, which the interpreter has too; its error is of float32's order.
    grown = tl.exp2(tl.abs(logit) * (2 * LOG2_E))
    magnitude = 1.0 - 2.0 / (grown + 1.0)
    return tl.where(logit < 0, -magnitude, magnitude) * (softcap * LOG2_E)


@triton.jit
def _load_visible(visible_ptr, token, length, HAS_MASK: tl.constexpr):
    visible = token < length
    if HAS_MASK:
        visible = visible & (tl.load(visible_ptr + token, mask=visible, other=0) != 0)
    return visible


@triton.jit
def _clear_tallies(high_ptr, kv_row, t, num_queries, LISTS: tl.constexpr):
    """Zeros for the selection to count in, for the lists of one KV head and query."""
    for list_ in range(0, LISTS):
        row = (kv_row * LISTS + list_) * num_queries + t
        tl.store(high_ptr + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def _byte_weight(p: tl.constexpr):
    """Twice what one set bit p of a byte is worth, as the signed byte that AND leaves."""
    if p == 7:
        return -1.0 / 64
    else:
        return 2.0 / (1 << p)


@triton.jit
def _byte_plane(words, p: tl.constexpr):
    if p == 7:
        return words & tl.full([], -128, tl.int8)
    else:
        return words & tl.full([], 1 << p, tl.int8)


@triton.jit
def _half_plane(words, p: tl.constexpr):
    """Bit p of 16-bit words as float16: each set bit a power of two, found by `_half_weight`."""
    if p == 15:
        return ((words >> 1) & 0x4000).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return (words & (1 << p)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _half_weight(p: tl.constexpr):
    """Twice the inverse of what one set bit p is worth as float16; below 10 it is subnormal."""
    if p < 10:
        return 2.0 ** (25 - p)
    elif p == 10:
        return 2.0**15
    elif p == 11:
        return 2.0**14
    elif p == 12:
        return 2.0**12
    elif p == 13:
        return 2.0**8
    else:
        return 1.0


@triton.jit
def _weights_of(logit, most):
    """``2 ** (logit - most)`` where `most` may be -inf for heads that saw nothing yet."""
    return tl.exp2(logit - tl.where(most == float("-inf"), 0.0, most))


@triton.jit(
    do_not_specialize=[
        "visible_stride_b", "visible_stride_t", "num_kv_heads", "num_queries", "tiles"
    ]
)  # fmt: skip
def rotated_scores_kernel(
    operand_ptr,
    total_ptr,
    unit_ptr,
    mean_ptr,
    planes_ptr,
    scale_ptr,
    counters_ptr,
    visible_ptr,
    logit_ptr,
    most_ptr,
    sum_ptr,
    count_ptr,
    high_ptr,
    visible_stride_b: tl.int64,
    visible_stride_t: tl.int64,
    num_kv_heads,
    num_queries,
    tiles,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LISTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """The estimate ``a (R (q / d)) . b + q . mu`` of every token of one tile.

    Words of two bytes are read as bytes, so bit p of the first and second byte are the planes p
    and p + 8. An AND leaves one plane of each as signed bytes, which the integer units multiply by
    the two bytes of the query, interleaved with zeros. All sums are whole numbers, hence exact.

    Writes logit float32 ``[r, token, G]``, most and sum ``[r, tile, G]`` (the tile's largest logit
    and its sum of ``2 ** (logit - most)``) and with a mask count int32 ``[b, t, tile]``. Clears
    high, in which the selection counts.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    t = row % num_queries
    kv_row = row // num_queries
    length = tl.load(counters_ptr).to(tl.int32)
    if tile * TILE_SIZE >= length:
        return
    if (tile == 0) and (block == 0):
        _clear_tallies(high_ptr, kv_row, t, num_queries, LISTS)
    if not HAS_MASK:
        length -= (num_queries - 1 - t).to(tl.int32)
    columns: tl.constexpr = 4 * HEADS
    r = tl.arange(0, ROWS)
    byte = tl.arange(0, 2 * BLOCK_D)
    column = tl.arange(0, columns)
    head = tl.arange(0, HEADS)
    half = tl.arange(0, 2)
    slot = (row * BLOCKS + block) * HEADS
    inside = byte < 2 * D
    tile_row = kv_row * tiles + tile
    words_ptr = planes_ptr + tile_row * (BITS * ROWS * 2 * D) + r[:, None] * (2 * D) + byte[None, :]
    words = tl.load(words_ptr, mask=inside[None, :], other=0)
    if BITS == 2:
        low_words = tl.load(words_ptr + ROWS * 2 * D, mask=inside[None, :], other=0)
    operand = tl.load(
        operand_ptr + slot * 8 * D + column[None, :] * (2 * D) + byte[:, None],
        mask=inside[:, None],
        other=0,
    )
    part = tl.arange(0, BLOCK_C)
    totals = tl.load(
        total_ptr + (slot + head)[:, None] * CHANNEL_BLOCKS + part[None, :],
        mask=(part < CHANNEL_BLOCKS)[None, :],
        other=0,
    )
    total = tl.sum(totals, axis=1).to(tl.float32) * (3 if BITS == 2 else 1)
    unit = tl.load(unit_ptr + slot + head)
    byte_worth = tl.where(tl.arange(0, 2) == 0, 256, 1)

    heads_in_all: tl.constexpr = BLOCKS * HEADS
    groups_per_tile: tl.constexpr = TILE_SIZE // GROUP
    planes_per_group: tl.constexpr = GROUP // 32
    mean_ptr += ((row * tiles + tile) * groups_per_tile) * heads_in_all + block * HEADS
    scale_ptr += tile_row * TILE_SIZE
    if HAS_MASK:
        visible_ptr += (kv_row // num_kv_heads) * visible_stride_b + t * visible_stride_t
    first = tile * TILE_SIZE
    place = r[:, None] + (TILE_SIZE // 2) * half[None, :]  # [32, 2] tokens of planes 0 and 8
    global_head = block * HEADS + head
    logit_ptr += (row * tiles * TILE_SIZE + first) * G
    most = tl.full([ROWS, HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS, HEADS], tl.float32)
    count = tl.zeros([ROWS, 2], tl.int32)
    # What a plane needs of memory is asked for a plane ahead: its loads cannot pass the stores.
    scale = tl.load(scale_ptr + place)
    visible = _load_visible(visible_ptr, first + place, length, HAS_MASK)
    for p in tl.static_range(8):
        if p < 7:
            next_place = place + (p + 1) * ROWS
            next_scale = tl.load(scale_ptr + next_place)
            next_visible = _load_visible(visible_ptr, first + next_place, length, HAS_MASK)
        if p % planes_per_group == 0:
            group = p // planes_per_group + half * (8 // planes_per_group)
            mean = tl.load(mean_ptr + group[:, None] * heads_in_all + head[None, :])
        sums = tl.dot(_byte_plane(words, p), operand, out_dtype=tl.int32)
        if BITS == 2:
            sums = 2 * sums + tl.dot(_byte_plane(low_words, p), operand, out_dtype=tl.int32)
        sums = tl.reshape(sums, [ROWS, 2, HEADS, 2])
        sums = tl.sum(sums * byte_worth[None, None, None, :], axis=3)  # [32, 2, HEADS]
        estimate = (sums.to(tl.float32) * _byte_weight(p) - total[None, None, :]) * unit
        logit = estimate * scale.to(tl.float32)[:, :, None] + mean[None, :, :]
        if HAS_CAP:
            logit = cap(logit, softcap)
        logit = tl.where(visible[:, :, None], logit, float("-inf"))
        token = place + p * ROWS
        address = logit_ptr + token[:, :, None] * G + global_head[None, None, :]
        tl.store(address, logit, mask=(global_head < G)[None, None, :])
        larger = tl.maximum(most, tl.max(logit, axis=1))
        weight = weight * _weights_of(most, larger)
        weight += tl.sum(_weights_of(logit, larger[:, None, :]), axis=1)
        most = larger
        if HAS_MASK:
            count += visible.to(tl.int32)
        if p < 7:
            scale = next_scale
            visible = next_visible
    largest = tl.max(most, axis=0)
    weight = tl.sum(weight * _weights_of(most, largest[None, :]), axis=0)
    partial = (row * tiles + tile) * G + global_head
    tl.store(most_ptr + partial, largest, mask=global_head < G)
    tl.store(sum_ptr + partial, weight, mask=global_head < G)
    if HAS_MASK and (block == 0) and (kv_row % num_kv_heads == 0):
        counted = ((kv_row // num_kv_heads) * num_queries + t) * tiles + tile
        tl.store(count_ptr + counted, tl.sum(tl.sum(count, axis=1), axis=0))


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_t", "visible_stride_b", "visible_stride_t",
        "num_kv_heads", "num_queries", "tiles",
    ]
)  # fmt: skip
def fier_scores_kernel(
    query_ptr,
    planes_ptr,
    scale_ptr,
    zero_ptr,
    counters_ptr,
    visible_ptr,
    logit_ptr,
    most_ptr,
    sum_ptr,
    count_ptr,
    high_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_t: tl.int64,
    visible_stride_b: tl.int64,
    visible_stride_t: tl.int64,
    num_kv_heads,
    num_queries,
    tiles,
    logit_scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """``q . K~`` of every token of a tile (FIER, Eq. 5); writes what `rotated_scores_kernel` does.

    A group's scale goes into the query, so each group has an operand of its own. A plane is 32
    tokens; ANDed, its words are float16 values as they stand.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    t = row % num_queries
    kv_row = row // num_queries
    h = kv_row % num_kv_heads
    b = kv_row // num_kv_heads
    length = tl.load(counters_ptr).to(tl.int32)
    if tile * TILE_SIZE >= length:
        return
    if (tile == 0) and (block == 0):
        _clear_tallies(high_ptr, kv_row, t, num_queries, LISTS)
    if not HAS_MASK:
        length -= (num_queries - 1 - t).to(tl.int32)
    r = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    head = tl.arange(0, HEADS)
    inside = channel < D
    global_head = block * HEADS + head
    query_ptr += b * stride_b + (h * G + block * HEADS) * stride_h + t * stride_t
    query = load_query(query_ptr, head, channel, G - block * HEADS, stride_h, D)
    # Within 1, so that its product with a scale stays in float16.
    peak = tl.max(tl.abs(query), axis=1)
    query = (query / tl.where(peak > 0, peak, 1.0)[:, None]).to(tl.float16)
    query = tl.trans(query)  # [BLOCK_D, HEADS]
    unit = peak * logit_scale
    tile_row = kv_row * tiles + tile
    words = tl.load(
        planes_ptr + (tile_row * ROWS + r)[:, None] * D + channel[None, :],
        mask=inside[None, :],
        other=0,
    )
    planes_per_group: tl.constexpr = GROUP // 32
    groups: tl.constexpr = 512 // GROUP
    scale_ptr += tile_row * (groups * D)
    zero_ptr += tile_row * (groups * D)
    # q . (zero - scale) of all groups at once, in the 16 rows that the matrix units want.
    group = tl.arange(0, 16)
    address = tl.minimum(group, groups - 1)[:, None] * D + channel[None, :]
    offsets = tl.dot(tl.load(zero_ptr + address, mask=inside[None, :], other=0.0), query)
    offsets -= tl.dot(tl.load(scale_ptr + address, mask=inside[None, :], other=0.0), query)
    if HAS_MASK:
        visible_ptr += b * visible_stride_b + t * visible_stride_t
    first = tile * TILE_SIZE
    logit_ptr += (row * tiles * TILE_SIZE + first) * G
    most = tl.full([ROWS, HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS, HEADS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
    visible = _load_visible(visible_ptr, first + r, length, HAS_MASK)
    for p in tl.static_range(16):
        if p % planes_per_group == 0:
            scaled = query * scale[:, None]
            chosen = (group == p // planes_per_group)[:, None]
            offset = tl.sum(tl.where(chosen, offsets, 0.0), axis=0)
            if p + planes_per_group < 16:
                step = (p // planes_per_group + 1) * D
                scale = tl.load(scale_ptr + channel + step, mask=inside, other=0.0)
        if p < 15:
            next_visible = _load_visible(visible_ptr, first + r + (p + 1) * ROWS, length, HAS_MASK)
        sums = tl.dot(_half_plane(words, p), scaled)
        logit = (sums * _half_weight(p) + offset[None, :]) * unit[None, :]
        if HAS_CAP:
            logit = cap(logit, softcap)
        logit = tl.where(visible[:, None], logit, float("-inf"))
        address = logit_ptr + (r + p * ROWS)[:, None] * G + global_head[None, :]
        tl.store(address, logit, mask=(global_head < G)[None, :])
        larger = tl.maximum(most, logit)
        weight = weight * _weights_of(most, larger) + _weights_of(logit, larger)
        most = larger
        if HAS_MASK:
            count += visible.to(tl.int32)
        if p < 15:
            visible = next_visible
    largest = tl.max(most, axis=0)
    weight = tl.sum(weight * _weights_of(most, largest[None, :]), axis=0)
    partial = (row * tiles + tile) * G + global_head
    tl.store(most_ptr + partial, largest, mask=global_head < G)
    tl.store(sum_ptr + partial, weight, mask=global_head < G)
    if HAS_MASK and (block == 0) and (h == 0):
        counted = (b * num_queries + t) * tiles + tile
        tl.store(count_ptr + counted, tl.sum(count, axis=0))
