"""A kernel that multiplies one bit plane of 16-bit words at a time, as the FIER scores do."""

from __future__ import annotations

import triton
import triton.language as tl

from fierpatch.kernels.scores import _half_plane, _half_weight


@triton.jit
def plane_sums_kernel(words_ptr, operand_ptr, sums_ptr, D: tl.constexpr):
    """Twice the sum of the operand's channels over the set bits: float32 ``[16, 32, 16]``."""
    row = tl.arange(0, 32)
    column = tl.arange(0, 16)
    channel = tl.arange(0, D)
    words = tl.load(words_ptr + row[:, None] * D + channel[None, :])
    operand = tl.load(operand_ptr + channel[:, None] * 16 + column[None, :])
    for p in tl.static_range(16):
        sums = tl.dot(_half_plane(words, p), operand) * _half_weight(p)
        tl.store(sums_ptr + (p * 32 + row)[:, None] * 16 + column[None, :], sums)
