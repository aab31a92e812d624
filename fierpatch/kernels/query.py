"""The query in the form that the rotated index scores: rotated, in whole numbers of two bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from fierpatch.kernels.constants import MAX_HEADS, TILE_SIZE
from fierpatch.kernels.early import await_previous, start_next

# The largest magnitude a channel takes: the high byte then stays within 127.
LEVELS = tl.constexpr(32512.0)


@triton.jit
def load_query(query_ptr, head, channel, num_heads, stride_h, D: tl.constexpr):
    """Query heads of one group and position as float32 ``[heads, channels]``."""
    mask = (head < num_heads)[:, None] & (channel < D)[None, :]
    address = query_ptr + head.to(tl.int64)[:, None] * stride_h + channel[None, :]
    return tl.load(address, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _dot(left, right, SPLIT: tl.constexpr):
    """``left [M, K] . right [K, N]`` in float32, of float16 and float32 within 2.

    The right is float16 in two parts where it does not fit one: 22 bits in all.
    """
    high = right.to(tl.float16)
    product = tl.dot(left, high)
    if SPLIT:
        low = ((right - high.to(tl.float32)) * 4096.0).to(tl.float16)
        product += tl.dot(left, low) * (1.0 / 4096)
    return product


@triton.jit
def _rotate(
    query,
    balance,
    matrix,
    operand_ptr,
    packed_ptr,
    total_ptr,
    unit_ptr,
    slot,
    task,
    logit_scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
    HAS_CODES: tl.constexpr,
):
    """Channels ``task * OUT ..`` of the rotated ``query [8, BLOCK_D]``, heads of one KV head.

    Writes, at slot ``(r, n) * HEADS``, which is row ``r = (b, h, t)`` and block n of HEADS heads:
        operand int8 ``[r, n, HEADS, 2, D]``: the two bytes of the rotated query in units of unit,
            the higher first.
        packed int8 ``[r, n, HEADS, 2, D]``, where there are codes: the same, of each four channels
            the second and third exchanged.
        total int32 ``[r, n, HEADS, D / OUT]``: the sum of those numbers, by block of channels.
        unit float32 ``[r, n, HEADS]``, times the logit scale.
    """
    head = tl.arange(0, MAX_HEADS)
    out = task * OUT + tl.arange(0, OUT)
    inside = out < D
    scaled = query * (1.0 / balance)[None, :]
    norm = tl.sqrt(tl.sum(scaled * scaled, axis=1))
    per_norm = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    rotated = _dot(
        tl.trans(matrix.to(tl.float16)), tl.trans(scaled * per_norm[:, None]), True
    )  # [OUT, heads]
    whole = tl.floor(rotated * (NORM * LEVELS) + 0.5)
    whole = tl.minimum(tl.maximum(whole, -LEVELS), LEVELS).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - high * 256
    mask = inside[:, None] & (head < HEADS)[None, :]
    place = operand_ptr + slot * 2 * D + head[None, :] * (2 * D) + out[:, None]
    tl.store(place, high.to(tl.int8), mask=mask)
    tl.store(place + D, low.to(tl.int8), mask=mask)
    if HAS_CODES:
        other = out + (out & 1) - ((out >> 1) & 1)
        place = packed_ptr + slot * 2 * D + head[None, :] * (2 * D) + other[:, None]
        tl.store(place, high.to(tl.int8), mask=mask)
        tl.store(place + D, low.to(tl.int8), mask=mask)
    total = tl.sum(tl.where(inside[:, None], whole, 0), axis=0)
    blocks: tl.constexpr = (D + OUT - 1) // OUT
    tl.store(total_ptr + (slot + head) * blocks + task, total, mask=head < HEADS)
    if task == 0:
        tl.store(unit_ptr + slot + head, norm / LEVELS * logit_scale, mask=head < HEADS)


@triton.jit
def _multiply_centres(
    query,
    centre,
    mean_ptr,
    group,
    num_groups,
    stride,
    logit_scale,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``q . mu`` times the logit scale, of some groups: mean float32 ``[group, stride]``."""
    head = tl.arange(0, MAX_HEADS)
    # By a power of two, the largest then in 1 .. 2: float16 holds bfloat16 and float16 so.
    peak = tl.maximum(tl.max(tl.abs(query), axis=1), 2.0**-100)
    peak = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    mean = _dot(centre, tl.trans(query * (1.0 / peak)[:, None]), SPLIT)  # [groups, heads]
    mean *= (peak * logit_scale)[None, :]
    written = (group < num_groups)[:, None] & (head < HEADS)[None, :]
    tl.store(mean_ptr + group[:, None] * stride + head[None, :], mean, mask=written)


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_t", "num_kv_heads", "num_queries", "tiles"
    ]
)  # fmt: skip
def query_kernel(
    query_ptr,
    balance_ptr,
    rotation_ptr,
    centre_ptr,
    counters_ptr,
    operand_ptr,
    packed_ptr,
    total_ptr,
    unit_ptr,
    mean_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_t: tl.int64,
    num_kv_heads,
    num_queries,
    tiles,
    logit_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_CODES: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Two tasks by program: rotate some channels, or ``q . mu`` of some groups.

    Writes what `_rotate` and `_multiply_centres` say; mean is float32 ``[r, groups, n, HEADS]``.

    What comes next may ask memory for much, so it starts when all has been asked for here.

    Starts beside `append_kernel` when that changes nothing that is read here but the length, by 1,
    which is of no consequence: the token is of a group that was open.
    """
    task = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    t = row % num_queries
    kv_row = row // num_queries
    h = kv_row % num_kv_heads
    b = kv_row // num_kv_heads
    query_ptr += b * stride_b + (h * G + block * HEADS) * stride_h + t * stride_t
    head = tl.arange(0, MAX_HEADS)
    channel = tl.arange(0, BLOCK_D)
    num_heads = tl.minimum(G - block * HEADS, HEADS)
    channel_blocks: tl.constexpr = (D + OUT - 1) // OUT
    if task < channel_blocks:
        out = task * OUT + tl.arange(0, OUT)
        matrix = tl.load(
            rotation_ptr + channel[:, None] * D + out[None, :],
            mask=(channel < D)[:, None] & (out < D)[None, :],
            other=0,
        )
        balance = tl.load(
            balance_ptr + kv_row * D + channel, mask=channel < D, other=1.0, cache_modifier=".cg"
        )
        query = load_query(query_ptr, head, channel, num_heads, stride_h, D)
        start_next(IS_EARLY)
        _rotate(
            query, balance, matrix, operand_ptr, packed_ptr, total_ptr, unit_ptr,
            (row * BLOCKS + block) * HEADS, task, logit_scale, D, HEADS, OUT, NORM, HAS_CODES,
        )  # fmt: skip
    else:
        query = load_query(query_ptr, head, channel, num_heads, stride_h, D)
        length = tl.load(counters_ptr, cache_modifier=".cg").to(tl.int32)
        first_group = (task - channel_blocks) * GROUPS
        num_groups = tl.cdiv(length, GROUP)
        if first_group < num_groups:
            all_groups = tiles * (TILE_SIZE // GROUP)
            group = first_group + tl.arange(0, GROUPS)
            centre = tl.load(
                centre_ptr + kv_row * all_groups * D + group[:, None] * D + channel[None, :],
                mask=(group < num_groups)[:, None] & (channel < D)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            start_next(IS_EARLY)
            _multiply_centres(
                query, centre, mean_ptr + row * all_groups * (BLOCKS * HEADS) + block * HEADS,
                group, num_groups, BLOCKS * HEADS, logit_scale, HEADS, SPLIT,
            )  # fmt: skip
        else:
            start_next(IS_EARLY)
    # What waits for this kernel waits for the one before it too. One program is enough for that,
    # and the others make room for those that found none.
    if (task == 0) and (row == 0) and (block == 0):
        await_previous(IS_EARLY)
