"""What blocks of keys weigh for sampled queries; no score leaves the program that computes it."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fierpatch.kernels.constants import LOG2_E
from fierpatch.kernels.launch import Specialization, aligned, as_mask
from fierpatch.kernels.logits import Logits, cap

_BLOCKS_AT_ONCE = 16  # of keys a program: a row of its output is then 64 bytes


@triton.jit(
    do_not_specialize=[
        "visible_stride_b", "visible_stride_t", "num_heads", "num_rows", "length", "num_blocks",
    ]
)  # fmt: skip
def block_masses_kernel(
    query_ptr,
    keys_ptr,
    position_ptr,
    visible_ptr,
    output_ptr,
    visible_stride_b: tl.int64,
    visible_stride_t: tl.int64,
    num_heads,
    num_rows,
    length,
    num_blocks,
    factor,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows of one query head against some blocks of keys: their log-sum-exps.

    Rows ascend by position, so blocks behind the last row's position are passed over.
    """
    first_block = tl.program_id(0) * BLOCKS
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(2).to(tl.int64)  # of all rows of the batch
    batch = head // num_heads
    is_row = row < num_rows
    position = tl.load(position_ptr + row, mask=is_row, other=-1).to(tl.int32)
    last_block = tl.minimum(first_block + BLOCKS, tl.max(position) // KEY_BLOCK + 1)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < D
    query = tl.load(
        query_ptr + (head * num_rows + row[:, None]) * D + channel[None, :],
        mask=is_row[:, None] & is_channel[None, :],
        other=0.0,
    )
    keys_ptr += head // GROUPS * length * D
    within = tl.arange(0, KEY_BLOCK)
    column = tl.arange(0, BLOCKS)
    masses = tl.full([BLOCK_M, BLOCKS], float("-inf"), tl.float32)
    for block in range(first_block, last_block):
        token = block * KEY_BLOCK + within
        is_token = token < length
        keys = tl.load(
            keys_ptr + token[None, :].to(tl.int64) * D + channel[:, None],
            mask=is_token[None, :] & is_channel[:, None],
            other=0.0,
        )
        logits = tl.dot(query, keys, input_precision=PRECISION) * factor
        if HAS_CAP:
            logits = cap(logits, softcap)
        allowed = token[None, :] <= position[:, None]
        if HAS_MASK:
            seen = visible_ptr + batch * visible_stride_b + row[:, None] * visible_stride_t
            mask = is_row[:, None] & is_token[None, :]
            allowed = allowed & (tl.load(seen + token[None, :], mask=mask, other=0) != 0)
        logits = tl.where(allowed, logits, float("-inf"))
        most = tl.max(logits, axis=1)
        base = tl.where(most > float("-inf"), most, 0.0)
        total = tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        logarithm = base + tl.log2(tl.where(total > 0, total, 1.0))
        mass = tl.where(total > 0, logarithm / LOG2_E, float("-inf"))
        masses = tl.where(column[None, :] == block - first_block, mass[:, None], masses)
    written = first_block + column
    address = output_ptr + (head * num_rows + row[:, None]) * num_blocks + written[None, :]
    tl.store(address, masses, mask=is_row[:, None] & (written < num_blocks)[None, :])


def block_masses(
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    logits: Logits,
    visible: Tensor | None = None,
    *,
    key_block: int,
) -> Tensor:
    """The log-sum-exp of each row's logits within each block of keys.

    Args:
        query: ``[B, Hq, R, D]``.
        keys: ``[B, H, S, D]``, in the query's dtype.
        positions: int64 ``[R]``, ascending: the last token that each row sees, below S.
        logits: how scores become logits.
        visible: bool ``[B or 1, 1, R or 1, S]``; None means every token.
        key_block: tokens of a block, a power of two of at least 16.

    Returns:
        float32 ``[B, Hq, R, ceil(S / key_block)]``, -inf where nothing is visible.
    """
    batch_size, num_heads, num_rows, head_dim = query.shape
    num_kv_heads, length = keys.shape[1], keys.shape[2]
    num_blocks = -(-length // key_block)
    query, keys = aligned(query.contiguous()), aligned(keys.contiguous())
    visible, strides = as_mask(visible)
    if visible is not None and visible.shape[2] == 1:
        strides = strides[0], 0
    output = query.new_empty((batch_size, num_heads, num_rows, num_blocks), dtype=torch.float32)
    specialization = masses_specialization(
        head_dim, num_heads // num_kv_heads, key_block, query.dtype, visible is not None,
        logits.has_cap,
    )  # fmt: skip
    programs = -(-num_blocks // _BLOCKS_AT_ONCE), -(-num_rows // _block_m(query.dtype, head_dim))
    scaled = logits.in_log2
    specialization.launch(
        (*programs, batch_size * num_heads),
        query, keys, aligned(positions), visible, output, *strides, num_heads, num_rows, length,
        num_blocks, scaled.factor, scaled.softcap,
    )  # fmt: skip
    return output


def _block_m(dtype: torch.dtype, head_dim: int) -> int:
    """Rows of a program, whose query it holds: fewer where they are wide."""
    if dtype == torch.float32:
        return 32
    return 128 if head_dim <= 128 else 64


@cache
def masses_specialization(
    head_dim: int,
    groups: int,
    key_block: int,
    dtype: torch.dtype,
    has_mask: bool,
    has_cap: bool,
) -> Specialization:
    """Of `block_masses_kernel`."""
    is_float32 = dtype == torch.float32
    constants = {
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "GROUPS": groups,
        "BLOCK_M": _block_m(dtype, head_dim),
        "KEY_BLOCK": key_block,
        "BLOCKS": _BLOCKS_AT_ONCE,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
        "PRECISION": "ieee" if is_float32 else "tf32",
    }
    num_warps, num_stages = (4, 2) if is_float32 else (8, 3)
    return Specialization(
        block_masses_kernel, constants, num_warps=num_warps, num_stages=num_stages
    )
