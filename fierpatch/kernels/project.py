"""A linear layer for a few rows, by programs so small that they find room beside others."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fierpatch.kernels.launch import Specialization, aligned

_BLOCK_B = 16  # rows that a program multiplies with its weights: the least of a `tl.dot`

_BLOCK_M = 32  # outputs of a program: 128 programs for 4,096 of them


@triton.jit(do_not_specialize=["num_rows", "num_outputs", "width"])
def project_kernel(
    source_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    length_ptr,
    num_rows,
    num_outputs,
    width,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
):
    """BLOCK_M outputs of BLOCK_B rows; without reading a weight where the length is 0."""
    if HAS_LENGTH:
        width = tl.where(tl.load(length_ptr) > 0, width, 0)
    output = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_output, is_row = output < num_outputs, row < num_rows
    weight_ptr += output[:, None].to(tl.int64) * width
    source_ptr += row[None, :].to(tl.int64) * width
    total = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
    for start in range(0, width, BLOCK_N):
        channel = start + tl.arange(0, BLOCK_N)
        is_channel = channel < width
        weight = tl.load(
            weight_ptr + channel[None, :],
            mask=is_output[:, None] & is_channel[None, :],
            other=0.0,
        )
        source = tl.load(
            source_ptr + channel[:, None], mask=is_row[None, :] & is_channel[:, None], other=0.0
        )
        total = tl.dot(weight, source, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    output_ptr += row[None, :].to(tl.int64) * num_outputs + output[:, None]
    tl.store(output_ptr, total, mask=is_output[:, None] & is_row[None, :])


def project(
    source: Tensor, weight: Tensor, bias: Tensor | None, length: Tensor | None = None
) -> Tensor:
    """`torch.nn.functional.linear` for a few rows: each 16 of them read the weights again.

    A library's product of this size takes all registers of a multiprocessor, so that beside another
    it waits for that to end. This one starts at once where there is room for a few warps.

    Args:
        source: ``[B, 1, N]``.
        weight: ``[M, N]``.
        bias: ``[M]``.
        length: int64 ``[1]``; where it is 0, nobody needs the result, and there is only the bias.

    Returns:
        ``[B, 1, M]`` in the dtype of the source, which is that of all.
    """
    num_rows, num_outputs, width = len(source), *weight.shape
    output = source.new_empty((num_rows, 1, num_outputs))
    specialization = project_specialization(source.dtype, bias is not None, length is not None)
    specialization.launch(
        (triton.cdiv(num_outputs, _BLOCK_M), triton.cdiv(num_rows, _BLOCK_B), 1),
        aligned(source.contiguous()), aligned(weight.contiguous()),
        None if bias is None else aligned(bias.contiguous()), output,
        length, num_rows, num_outputs, width,
    )  # fmt: skip
    return output


@cache
def project_specialization(dtype: torch.dtype, has_bias: bool, has_length: bool) -> Specialization:
    """Of `project_kernel`."""
    is_float32 = dtype == torch.float32
    constants = {
        "BLOCK_B": _BLOCK_B,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": 64 if is_float32 else 128,
        "PRECISION": "ieee" if is_float32 else "tf32",
        "HAS_BIAS": has_bias,
        "HAS_LENGTH": has_length,
    }
    return Specialization(project_kernel, constants, num_warps=4, num_stages=4)
