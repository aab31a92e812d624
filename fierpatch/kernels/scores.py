"""Scores of every token by the bit planes of an index, and each head's softmax statistics.

A program scores one tile of 512 tokens for up to 8 query heads of a KV head. Logits are in units of
log2, so that ``exp2`` turns them into weights. What the selection gets of a logit is its weight
relative to the largest of its tile, in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fierpatch.kernels.constants import EXPONENTS, ROWS, TILE_SIZE
from fierpatch.kernels.early import await_previous, start_next
from fierpatch.kernels.logits import cap
from fierpatch.kernels.query import load_query


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
        tl.store(
            high_ptr + row * EXPONENTS + tl.arange(0, EXPONENTS), tl.zeros([EXPONENTS], tl.int32)
        )


@triton.jit
def _byte_weight(p: tl.constexpr):
    """Twice what one set bit p of a byte is worth, as the signed byte that AND leaves."""
    if p == 7:
        return -1.0 / 64
    else:
        return 2.0 / (1 << p)


@triton.jit
def _byte_plane(words, p: tl.constexpr):
    """Bit p of bytes, as the signed byte that AND leaves."""
    if p == 7:
        return words & tl.full([], -128, tl.int8)
    else:
        return words & tl.full([], 1 << p, tl.int8)


@triton.jit
def _byte_sums(
    bytes_, low_bytes, operand, p: tl.constexpr, HEADS: tl.constexpr, BITS: tl.constexpr
):
    """Plane p of bytes times the query: twice the sum over set bits, ``[32, HEADS]``."""
    sums = tl.dot(_byte_plane(bytes_, p), operand, out_dtype=tl.int32)
    if BITS == 2:
        sums = 2 * sums + tl.dot(_byte_plane(low_bytes, p), operand, out_dtype=tl.int32)
    byte_worth = tl.where(tl.arange(0, 2) == 0, 256, 1)
    sums = tl.sum(tl.reshape(sums, [ROWS, HEADS, 2]) * byte_worth[None, None, :], axis=2)
    return sums.to(tl.float32) * _byte_weight(p)


@triton.jit
def _join_eight(a, b, c, d, e, f, g, h):
    """Eight planes ``[32, HEADS]`` as ``[32, HEADS, 2, 2, 2]``, the lowest bit of a plane first."""
    low = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.join(low, tl.join(tl.join(e, f), tl.join(g, h)))


@triton.jit
def _all_byte_sums(bytes_, low_bytes, operand, HEADS: tl.constexpr, BITS: tl.constexpr):
    return _join_eight(
        _byte_sums(bytes_, low_bytes, operand, 0, HEADS, BITS),
        _byte_sums(bytes_, low_bytes, operand, 1, HEADS, BITS),
        _byte_sums(bytes_, low_bytes, operand, 2, HEADS, BITS),
        _byte_sums(bytes_, low_bytes, operand, 3, HEADS, BITS),
        _byte_sums(bytes_, low_bytes, operand, 4, HEADS, BITS),
        _byte_sums(bytes_, low_bytes, operand, 5, HEADS, BITS),
        _byte_sums(bytes_, low_bytes, operand, 6, HEADS, BITS),
        _byte_sums(bytes_, low_bytes, operand, 7, HEADS, BITS),
    )


@triton.jit
def _token_order(low, high, HEADS: tl.constexpr):
    """Planes 0 to 7 and 8 to 15, each out of `_join_eight`, as tokens: ``[512, HEADS]``."""
    planes = tl.permute(tl.join(low, high), (5, 4, 3, 2, 0, 1))
    return tl.reshape(planes, [TILE_SIZE, HEADS])


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
def half_bits(weight, logit):
    """A weight up to 1 as 15 bits, those of float32 from the exponent on, rounded: `weight_of`.

    0 is an invisible token; one that is visible has 1 at least.
    """
    bits = (weight.to(tl.int32, bitcast=True) + 0x4000) >> 15
    return tl.where(logit > float("-inf"), tl.maximum(bits, 1), 0).to(tl.int16)


@triton.jit
def weight_of(bits):
    """The float32 that `half_bits` stand for, in an int32."""
    return (bits << 15).to(tl.float32, bitcast=True)


@triton.jit
def _write_tile(
    logit,
    weight_ptr,
    most_ptr,
    sum_ptr,
    row,
    tile,
    tiles,
    first_head,
    G: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A tile's logits ``[512, HEADS]`` as the selection reads them, see `rotated_scores_kernel`."""
    head = first_head + tl.arange(0, HEADS)
    most = tl.max(logit, axis=0)
    weight = tl.exp2(logit - tl.where(most == float("-inf"), 0.0, most)[None, :])
    token = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    weight_ptr += row * tiles * (TILE_SIZE * G)
    tl.store(
        weight_ptr + token[:, None] * G + head[None, :],
        half_bits(weight, logit),
        mask=(head < G)[None, :],
    )
    place = (row * tiles + tile) * G + head
    tl.store(most_ptr + place, most, mask=head < G)
    tl.store(sum_ptr + place, tl.sum(weight, axis=0), mask=head < G)


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
    weight_ptr,
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
    margin,
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
    IS_EARLY: tl.constexpr,
):
    """The estimate ``a (R (q / d)) . b + q . mu`` of every token of one tile.

    `margin` adds so many units of ``a |R (q / d)| / LEVELS``, see `RotatedIndex.scores`.

    Bit p of a word's low and high byte are the planes p and p + 8. An AND leaves one plane as
    signed bytes, which the integer units multiply by the two bytes of the query. All sums are whole
    numbers, hence exact.

    Writes most and sum float32 ``[r, tile, G]`` (the tile's largest logit and its sum of ``2 **
    (logit - most)``), weight int16 ``[r, token, G]`` (each token's part of that sum, see
    `weight_of`) and with a mask count int32 ``[b, t, tile]``. Clears high, in which the selection
    counts.

    Starts beside `query_kernel`, and asks for its planes before it waits for the query. Where
    `append_kernel` is not done either, the newest token may not be counted or coded yet.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    t = row % num_queries
    kv_row = row // num_queries
    length = tl.load(counters_ptr, cache_modifier=".cg").to(tl.int32)
    if tile * TILE_SIZE >= (length + 1 if IS_EARLY else length):
        return
    heads_in_all: tl.constexpr = BLOCKS * HEADS
    groups_per_tile: tl.constexpr = TILE_SIZE // GROUP
    r = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    column = tl.arange(0, 2 * HEADS)
    head = tl.arange(0, HEADS)
    slot = (row * BLOCKS + block) * HEADS
    inside = channel < D
    tile_row = kv_row * tiles + tile
    words_ptr = planes_ptr + tile_row * (BITS * ROWS * D) + r[:, None] * D + channel[None, :]
    words = tl.load(words_ptr, mask=inside[None, :], other=0, cache_modifier=".cg")
    low_words = words
    if BITS == 2:
        low_words = tl.load(
            words_ptr + ROWS * D, mask=inside[None, :], other=0, cache_modifier=".cg"
        )
    token = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    scale_ptr += kv_row * tiles * TILE_SIZE
    scale = tl.load(scale_ptr + token, cache_modifier=".cg")
    if (tile == 0) and (block == 0):
        _clear_tallies(high_ptr, kv_row, t, num_queries, LISTS)
    await_previous(IS_EARLY)
    if IS_EARLY:
        # A branch here would take the words out of their registers.
        is_newest = tile * TILE_SIZE + TILE_SIZE >= length
        again = inside[None, :] & is_newest
        words = tl.load(words_ptr, mask=again, other=words, cache_modifier=".cg")
        if BITS == 2:
            low_words = tl.load(
                words_ptr + ROWS * D, mask=again, other=low_words, cache_modifier=".cg"
            )
        scale = tl.load(scale_ptr + token, mask=is_newest, other=scale, cache_modifier=".cg")
        length = tl.load(counters_ptr, cache_modifier=".cg").to(tl.int32)
    if not HAS_MASK:
        length -= (num_queries - 1 - t).to(tl.int32)
    operand = tl.load(
        operand_ptr + slot * 2 * D + column[None, :] * D + channel[:, None],
        mask=inside[:, None],
        other=0,
    )
    part = tl.arange(0, BLOCK_C)
    totals = tl.load(
        total_ptr + (slot + head)[:, None] * CHANNEL_BLOCKS + part[None, :],
        mask=(part < CHANNEL_BLOCKS)[None, :],
        other=0,
    )
    total = tl.sum(totals, axis=1).to(tl.float32) * (3 if BITS == 2 else 1) - margin
    unit = tl.load(unit_ptr + slot + head)
    group = tile * groups_per_tile + tl.arange(0, groups_per_tile)
    mean_ptr += row * tiles * (groups_per_tile * heads_in_all) + block * HEADS
    mean = tl.load(mean_ptr + group[:, None] * heads_in_all + head[None, :])
    low = _all_byte_sums(words.to(tl.int8), low_words.to(tl.int8), operand, HEADS, BITS)
    high = _all_byte_sums(
        (words >> 8).to(tl.int8), (low_words >> 8).to(tl.int8), operand, HEADS, BITS
    )
    sums = _token_order(low, high, HEADS)
    if HAS_MASK:
        visible_ptr += (kv_row // num_kv_heads) * visible_stride_b + t * visible_stride_t
    visible = _load_visible(visible_ptr, token, length, HAS_MASK)
    logit = (sums - total[None, :]) * unit[None, :] * scale.to(tl.float32)[:, None]
    logit = tl.reshape(logit, [groups_per_tile, GROUP, HEADS]) + mean[:, None, :]
    logit = tl.reshape(logit, [TILE_SIZE, HEADS])
    if HAS_CAP:
        logit = cap(logit, softcap)
    logit = tl.where(visible[:, None], logit, float("-inf"))
    start_next(IS_EARLY)
    _write_tile(logit, weight_ptr, most_ptr, sum_ptr, row, tile, tiles, block * HEADS, G, HEADS)
    if HAS_MASK and (block == 0) and (kv_row % num_kv_heads == 0):
        counted = ((kv_row // num_kv_heads) * num_queries + t) * tiles + tile
        tl.store(count_ptr + counted, tl.sum(visible.to(tl.int32), axis=0))


@triton.jit
def _fier_plane(
    words, query, offsets, scale_ptr, inside, p: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr
):
    """Plane p's ``q . K~`` in units of the query's largest channel: ``[32, HEADS]``."""
    group: tl.constexpr = p * ROWS // GROUP
    scale = tl.load(scale_ptr + group * D, mask=inside, other=0.0)
    sums = tl.dot(_half_plane(words, p), query * scale[:, None]) * _half_weight(p)
    is_its = (tl.arange(0, 16) == group)[:, None]
    return sums + tl.sum(tl.where(is_its, offsets, 0.0), axis=0)[None, :]


@triton.jit
def _fier_planes(
    words, query, offsets, scale_ptr, inside,
    p: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    return _join_eight(
        _fier_plane(words, query, offsets, scale_ptr, inside, p, D, GROUP),
        _fier_plane(words, query, offsets, scale_ptr, inside, p + 1, D, GROUP),
        _fier_plane(words, query, offsets, scale_ptr, inside, p + 2, D, GROUP),
        _fier_plane(words, query, offsets, scale_ptr, inside, p + 3, D, GROUP),
        _fier_plane(words, query, offsets, scale_ptr, inside, p + 4, D, GROUP),
        _fier_plane(words, query, offsets, scale_ptr, inside, p + 5, D, GROUP),
        _fier_plane(words, query, offsets, scale_ptr, inside, p + 6, D, GROUP),
        _fier_plane(words, query, offsets, scale_ptr, inside, p + 7, D, GROUP),
    )


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
    weight_ptr,
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
    groups: tl.constexpr = TILE_SIZE // GROUP
    scale_ptr += tile_row * (groups * D)
    zero_ptr += tile_row * (groups * D)
    # q . (zero - scale) of all groups at once, in the 16 rows that the matrix units want.
    group = tl.arange(0, 16)
    address = tl.minimum(group, groups - 1)[:, None] * D + channel[None, :]
    offsets = tl.dot(tl.load(zero_ptr + address, mask=inside[None, :], other=0.0), query)
    offsets -= tl.dot(tl.load(scale_ptr + address, mask=inside[None, :], other=0.0), query)
    token = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    if HAS_MASK:
        visible_ptr += b * visible_stride_b + t * visible_stride_t
    visible = _load_visible(visible_ptr, token, length, HAS_MASK)
    scale_ptr += channel
    low = _fier_planes(words, query, offsets, scale_ptr, inside, 0, D, GROUP)
    high = _fier_planes(words, query, offsets, scale_ptr, inside, 8, D, GROUP)
    logit = _token_order(low, high, HEADS) * unit[None, :]
    if HAS_CAP:
        logit = cap(logit, softcap)
    logit = tl.where(visible[:, None], logit, float("-inf"))
    _write_tile(logit, weight_ptr, most_ptr, sum_ptr, row, tile, tiles, block * HEADS, G, HEADS)
    if HAS_MASK and (block == 0) and (h == 0):
        counted = (b * num_queries + t) * tiles + tile
        tl.store(count_ptr + counted, tl.sum(visible.to(tl.int32), axis=0))
