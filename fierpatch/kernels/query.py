"""The query in the form that the rotated index scores: rotated, in whole numbers of two bytes."""

from __future__ import annotations

import triton
import triton.language as tl

# The largest magnitude a channel takes: the high byte then stays within 127.
LEVELS = tl.constexpr(32512.0)


@triton.jit
def load_query(query_ptr, head, channel, num_heads, stride_h, D: tl.constexpr):
    """Query heads of one group and position as float32 ``[heads, channels]``."""
    mask = (head < num_heads)[:, None] & (channel < D)[None, :]
    address = query_ptr + head.to(tl.int64)[:, None] * stride_h + channel[None, :]
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_t", "num_kv_heads", "num_queries", "tiles"
    ]
)  # fmt: skip
def rotate_query_kernel(
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
    PRECISION: tl.constexpr,
):
    """Two tasks by program: rotate some channels, or ``q . mu`` of some groups.

    Writes, for row ``r = (b, h, t)`` and block n of HEADS query heads:
        operand int16 ``[r, n, 2, HEADS, 2, D]``: bytes of the rotated query in units of unit, as
            the plane of the low (first) or high byte of the index's words meets them, high byte of
            the query first.
        total int32 ``[r, n, HEADS, D / OUT]``: the sum of those numbers, by block of channels.
        unit float32 ``[r, n, HEADS]``, times the logit scale.
        mean float32 ``[r, groups, n, HEADS]``: ``q . mu`` times the logit scale.
    """
    task = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    t = row % num_queries
    h = row // num_queries % num_kv_heads
    b = row // num_queries // num_kv_heads
    head = tl.arange(0, 16)
    first = block * HEADS
    num_heads = tl.minimum(G - first, HEADS)
    channel = tl.arange(0, BLOCK_D)
    query_ptr += b * stride_b + (h * G + first) * stride_h + t * stride_t
    query = load_query(query_ptr, head, channel, num_heads, stride_h, D)
    channel_blocks: tl.constexpr = (D + OUT - 1) // OUT
    if task < channel_blocks:
        kv_row = row // num_queries
        balance = tl.load(balance_ptr + kv_row * D + channel, mask=channel < D, other=1.0)
        scaled = query / balance[None, :]
        norm = tl.sqrt(tl.sum(scaled * scaled, axis=1))
        out = task * OUT + tl.arange(0, OUT)
        inside = out < D
        matrix = tl.load(
            rotation_ptr + channel[:, None] * D + out[None, :],
            mask=(channel < D)[:, None] & inside[None, :],
            other=0,
        )
        rotated = tl.dot(scaled, matrix.to(tl.float32), input_precision="tf32x3") * NORM
        per_unit = tl.where(norm > 0, LEVELS / tl.where(norm > 0, norm, 1.0), 0.0)
        whole = tl.floor(rotated * per_unit[:, None] + 0.5)
        whole = tl.minimum(tl.maximum(whole, -LEVELS), LEVELS).to(tl.int32)
        high = (whole + 128) >> 8
        low = whole - high * 256
        slot = (row * BLOCKS + block) * HEADS
        mask = (head < HEADS)[:, None] & inside[None, :]
        # [r, n, 2, HEADS, 2, D]: half-word, head, byte of the query, channel.
        place = operand_ptr + slot * 4 * D + head[:, None] * (2 * D) + out[None, :]
        other_half = HEADS * 2 * D
        tl.store(place, (high & 0xFF).to(tl.int16), mask=mask)
        tl.store(place + D, (low & 0xFF).to(tl.int16), mask=mask)
        tl.store(place + other_half, (high << 8).to(tl.int16), mask=mask)
        tl.store(place + other_half + D, (low << 8).to(tl.int16), mask=mask)
        total = tl.sum(tl.where(inside[None, :], whole, 0), axis=1)
        tl.store(total_ptr + (slot + head) * channel_blocks + task, total, mask=head < HEADS)
        if task == 0:
            unit = norm / LEVELS * logit_scale
            tl.store(unit_ptr + slot + head, unit, mask=head < HEADS)
    else:
        length = tl.load(counters_ptr).to(tl.int32)
        group = (task - channel_blocks) * GROUPS + tl.arange(0, GROUPS)
        num_groups = tl.cdiv(length, GROUP)
        if (task - channel_blocks) * GROUPS < num_groups:
            kv_row = row // num_queries
            all_groups = tiles * (512 // GROUP)
            centre = tl.load(
                centre_ptr + (kv_row * all_groups + group)[:, None] * D + channel[None, :],
                mask=(group < num_groups)[:, None] & (channel < D)[None, :],
                other=0.0,
            ).to(tl.float32)
            # TF32 holds a float16 centre and a query of two bytes exactly.
            mean = tl.dot(query, tl.trans(centre), input_precision=PRECISION) * logit_scale
            column = (row * all_groups + group)[None, :] * (BLOCKS * HEADS) + first
            written = (head < HEADS)[:, None] & (group < num_groups)[None, :]
            tl.store(mean_ptr + column + head[:, None], mean, mask=written)
