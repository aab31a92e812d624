"""Where the rows of K and V lie: in a buffer each, or paired in one, see `fierpatch.rows`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rows_of(buffer_ptr, row, num_rows, capacity, WIDTH: tl.constexpr, PAIR: tl.constexpr):
    """The first token of KV head `row`, and the step to the next token.

    Args:
        row, num_rows: of ``B * H``.
        WIDTH: D or Dv.
        PAIR: ``D + Dv`` where K and V are paired, else 0.
    """
    if PAIR > 0:
        return buffer_ptr + row * PAIR, num_rows.to(tl.int64) * PAIR
    else:
        return buffer_ptr + row * capacity * WIDTH, WIDTH


def pair_width(keys: Tensor) -> int:
    """``D + Dv`` where ``keys [B, H, C, D]`` are those of paired rows, 0 where contiguous."""
    if keys.is_contiguous():
        return 0
    batch_size, num_heads = keys.shape[:2]
    return keys.stride(2) // (batch_size * num_heads)


def is_laid_out(keys: Tensor) -> bool:
    """Whether ``keys [B, H, C, D]`` are contiguous or those of paired rows."""
    batch_size, num_heads = keys.shape[:2]
    width = keys.stride(2) // (batch_size * num_heads)
    strides = (num_heads * width, width, batch_size * num_heads * width, 1)
    # Of one row of a batch a model's keys lie as paired ones do, without values between them.
    first = 1 if batch_size == 1 else 0
    return keys.is_contiguous() or keys.stride()[first:] == strides[first:]
