"""Attention of one program over some tokens at once, wherever their rows lie."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fierpatch.kernels.constants import EMPTY, LOG2_E, MISSING
from fierpatch.kernels.logits import cap
from fierpatch.kernels.residency import settle

_SLICE = 32  # channels of a float32 product that are added up one after the other


@triton.jit
def _slices(x, SLICES: tl.constexpr):
    """``[M, D]`` as ``[SLICES, M, D / SLICES]``."""
    parts = tl.reshape(x, [x.shape[0], SLICES, x.shape[1] // SLICES])
    return tl.permute(parts, (1, 0, 2))


@triton.jit
def products(query, keys, SLICES: tl.constexpr, PRECISION: tl.constexpr):
    """``query [H, D] . keys [N, D]`` as float32 ``[H, N]``.

    A sum of many terms one after the other errs by more than sums of a few, added up at the end.
    """
    if SLICES == 1:
        return tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    else:
        turned = tl.permute(_slices(keys, SLICES), (0, 2, 1))
        return tl.sum(tl.dot(_slices(query, SLICES), turned, input_precision=PRECISION), axis=0)


@triton.jit
def attend_block(
    query,
    slot,
    most,
    total,
    mixed,
    keys_ptr,
    values_ptr,
    key_step,
    value_step,
    token_index_ptr,
    hot_ptr,
    row_of_ptr,
    visible_ptr,
    width,
    capacity,
    logit_scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_LIST: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """The softmax over some slots more; also what was read for them, and what of it was missing."""
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if HAS_LIST:
        # Past the first-level cache, for the list is not of the kernel before if that places.
        token = tl.load(token_index_ptr + slot, mask=slot < width, other=-1, cache_modifier=".cg")
        # None behind the end, if more were stored than there is room for.
        is_used = (token >= 0) & (token < capacity)
    else:
        token = slot.to(tl.int64)
        is_used = slot < width
        if HAS_MASK:
            is_used = is_used & (tl.load(visible_ptr + slot, mask=is_used, other=0) != 0)
    key_ptr = keys_ptr + token * key_step
    value_ptr = values_ptr + token * value_step
    is_missing = is_used
    if HAS_HOT:
        held = tl.load(row_of_ptr + token, mask=is_used, other=EMPTY, cache_modifier=".cg").to(
            tl.int64
        )
        is_missing = is_used & (held < 0)
        row_ptr = hot_ptr + tl.maximum(held, 0) * PAIR
        key_ptr = tl.where(is_missing, key_ptr, row_ptr)
        value_ptr = tl.where(is_missing, value_ptr, row_ptr + D)
    keys = tl.load(
        key_ptr[:, None] + channel[None, :],
        mask=is_used[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    values = tl.load(
        value_ptr[:, None] + value_channel[None, :],
        mask=is_used[:, None] & (value_channel < DV)[None, :],
        other=0.0,
    )
    logit = products(query, keys, SLICES, PRECISION) * logit_scale
    if HAS_CAP:
        logit = cap(logit, softcap)
    logit = tl.where(is_used[None, :], logit, float("-inf"))
    larger = tl.maximum(most, tl.max(logit, axis=1))
    reference = tl.where(larger == float("-inf"), 0.0, larger)
    weight = tl.exp2((logit - reference[:, None]) * LOG2_E)
    shrink = tl.exp2((most - reference) * LOG2_E)
    total = total * shrink + tl.sum(weight, axis=1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weight.to(values.dtype), values, mixed, input_precision=PRECISION)
    return larger, total, mixed, keys, values, token, is_missing


@triton.jit
def leave(
    keys,
    values,
    token,
    slot,
    is_missing,
    place_ptr,
    left_ptr,
    hot_ptr,
    row_of_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Leave what was missing of some slots in the hot rows that `place_kernel` gives it."""
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    place = tl.load(place_ptr + slot, mask=is_missing, other=MISSING)
    left = tl.load(left_ptr + slot, mask=is_missing, other=EMPTY)
    row_ptr = hot_ptr + (place - MISSING).to(tl.int64)[:, None] * PAIR
    tl.store(row_ptr + channel[None, :], keys, mask=is_missing[:, None] & (channel < D)[None, :])
    tl.store(
        row_ptr + D + value_channel[None, :],
        values,
        mask=is_missing[:, None] & (value_channel < DV)[None, :],
    )
    settle(row_of_ptr, token, place, left, is_missing)


def block_size(widest: int, dtype: torch.dtype) -> int:
    """Tokens that a program attends to at once."""
    return 16 if dtype == torch.float32 else 32 if widest > 128 else 64


def product_constants(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """How `products` are taken of such keys."""
    is_float32 = dtype == torch.float32
    return {
        "SLICES": max(triton.next_power_of_2(head_dim) // _SLICE, 1) if is_float32 else 1,
        "PRECISION": "ieee" if is_float32 else "tf32",
    }
