"""The query in the form that the rotated index scores: rotated, in whole numbers of two bytes."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

# The largest magnitude a channel takes: the high byte then stays within 127.
LEVELS = tl.constexpr(32512.0)


@triton.jit
def load_query(query_ptr, head, channel, num_heads, stride_h, D: tl.constexpr):
    """Query heads of one group and position as float32 ``[heads, channels]``."""
    mask = (head < num_heads)[:, None] & (channel < D)[None, :]
    address = query_ptr + head.to(tl.int64)[:, None] * stride_h + channel[None, :]
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _dot(left, right, SPLIT: tl.constexpr):
    """``left [M, K] . right [K, N]`` in float32, of float32 within 2 and float16.

    The left is float16 in two parts where it does not fit one: 22 bits in all.
    """
    high = left.to(tl.float16)
    product = tl.dot(high, right)
    if SPLIT:
        low = ((left - high.to(tl.float32)) * 4096.0).to(tl.float16)
        product += tl.dot(low, right) * (1.0 / 4096)
    return product


@triton.jit
def _rotate(
    query,
    balance_ptr,
    rotation_ptr,
    operand_ptr,
    total_ptr,
    unit_ptr,
    slot,
    task,
    logit_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
):
    """Channels ``task * OUT ..`` of the rotated query, for HEADS query heads of a KV head.

    Writes, at slot ``(r, n) * HEADS``, which is row ``r = (b, h, t)`` and block n of HEADS heads:
        operand int16 ``[r, n, 2, HEADS, 2, D]``: bytes of the rotated query in units of unit, as
            the plane of the low (first) or high byte of the index's words meets them, high byte of
            the query first.
        total int32 ``[r, n, HEADS, D / OUT]``: the sum of those numbers, by block of channels.
        unit float32 ``[r, n, HEADS]``, times the logit scale.
    """
    head = tl.arange(0, 16)
    channel = tl.arange(0, BLOCK_D)
    out = task * OUT + tl.arange(0, OUT)
    inside = out < D
    matrix = tl.load(
        rotation_ptr + channel[:, None] * D + out[None, :],
        mask=(channel < D)[:, None] & inside[None, :],
        other=0,
    )
    balance = tl.load(balance_ptr + channel, mask=channel < D, other=1.0)
    scaled = query * (1.0 / balance)[None, :]
    norm = tl.sqrt(tl.sum(scaled * scaled, axis=1))
    per_norm = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    rotated = _dot(scaled * per_norm[:, None], matrix.to(tl.float16), True)
    whole = tl.floor(rotated * (NORM * LEVELS) + 0.5)
    whole = tl.minimum(tl.maximum(whole, -LEVELS), LEVELS).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - high * 256
    mask = (head < HEADS)[:, None] & inside[None, :]
    # [r, n, 2, HEADS, 2, D]: half-word, head, byte of the query, channel.
    place = operand_ptr + slot * 4 * D + head[:, None] * (2 * D) + out[None, :]
    other_half = HEADS * 2 * D
    tl.store(place, (high & 0xFF).to(tl.int16), mask=mask)
    tl.store(place + D, (low & 0xFF).to(tl.int16), mask=mask)
    tl.store(place + other_half, (high << 8).to(tl.int16), mask=mask)
    tl.store(place + other_half + D, (low << 8).to(tl.int16), mask=mask)
    total = tl.sum(tl.where(inside[None, :], whole, 0), axis=1)
    blocks: tl.constexpr = (D + OUT - 1) // OUT
    tl.store(total_ptr + (slot + head) * blocks + task, total, mask=head < HEADS)
    if task == 0:
        tl.store(unit_ptr + slot + head, norm / LEVELS * logit_scale, mask=head < HEADS)


@triton.jit
def _multiply_centres(
    query,
    centre_ptr,
    mean_ptr,
    first_group,
    num_groups,
    stride,
    logit_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``q . mu`` times the logit scale, of GROUPS groups: mean float32 ``[group, stride]``."""
    head = tl.arange(0, 16)
    channel = tl.arange(0, BLOCK_D)
    group = first_group + tl.arange(0, GROUPS)
    centre = tl.load(
        centre_ptr + group[:, None] * D + channel[None, :],
        mask=(group < num_groups)[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    # By a power of two, the largest then in 1 .. 2: float16 holds bfloat16 and float16 so.
    peak = tl.maximum(tl.max(tl.abs(query), axis=1), 2.0**-100)
    peak = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    mean = _dot(query * (1.0 / peak)[:, None], tl.trans(centre), SPLIT)
    mean *= (peak * logit_scale)[:, None]
    written = (head < HEADS)[:, None] & (group < num_groups)[None, :]
    tl.store(mean_ptr + group[None, :] * stride + head[:, None], mean, mask=written)


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
    SPLIT: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Two tasks by program: rotate some channels, or ``q . mu`` of some groups.

    Writes what `_rotate` and `_multiply_centres` say; mean is float32 ``[r, groups, n, HEADS]``.
    """
    if IS_EARLY:
        gdc_launch_dependents()
    task = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    t = row % num_queries
    kv_row = row // num_queries
    h = kv_row % num_kv_heads
    b = kv_row // num_kv_heads
    query_ptr += b * stride_b + (h * G + block * HEADS) * stride_h + t * stride_t
    num_heads = tl.minimum(G - block * HEADS, HEADS)
    query = load_query(query_ptr, tl.arange(0, 16), tl.arange(0, BLOCK_D), num_heads, stride_h, D)
    channel_blocks: tl.constexpr = (D + OUT - 1) // OUT
    if task < channel_blocks:
        _rotate(
            query, balance_ptr + kv_row * D, rotation_ptr, operand_ptr, total_ptr, unit_ptr,
            (row * BLOCKS + block) * HEADS, task, logit_scale, D, BLOCK_D, HEADS, OUT, NORM,
        )  # fmt: skip
    else:
        length = tl.load(counters_ptr).to(tl.int32)
        first_group = (task - channel_blocks) * GROUPS
        num_groups = tl.cdiv(length, GROUP)
        if first_group < num_groups:
            all_groups = tiles * (512 // GROUP)
            _multiply_centres(
                query, centre_ptr + kv_row * all_groups * D,
                mean_ptr + row * all_groups * (BLOCKS * HEADS) + block * HEADS,
                first_group, num_groups, BLOCKS * HEADS, logit_scale,
                D, BLOCK_D, HEADS, GROUPS, SPLIT,
            )  # fmt: skip
