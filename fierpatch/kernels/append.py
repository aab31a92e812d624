"""Storing new keys and values, and quantising them into the index, in one launch."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from fierpatch.index.packing import TILE_SIZE as TOKENS_PER_TILE
from fierpatch.index.refinement import Refinement
from fierpatch.index.rotated import TWO_BIT_THRESHOLD
from fierpatch.index.rotation import rotation_norm
from fierpatch.kernels.constants import ROWS, TILE_SIZE
from fierpatch.kernels.early import can_start_early, start_next
from fierpatch.kernels.launch import Specialization, as_rows
from fierpatch.kernels.layout import is_laid_out, pair_width, rows_of
from fierpatch.kernels.quantize import (
    codes_of,
    encode,
    load_factors,
    multiply_factors,
    quantize_fier,
    quantize_rotated,
    store_codes,
)

_STORE_BLOCK = 64  # tokens a program stores of a prompt
_INDEX_BLOCK = 8  # tokens stored at once before they are indexed

NO_INDEX, ROTATED, FIER = 0, 1, 2


@triton.jit
def _store(
    new_ptr,
    buffer_ptr,
    step,
    stride_t,
    first,
    num_new,
    stored,
    capacity,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Copy new tokens ``first .. first + BLOCK_T`` of one KV head to their rows of the buffer.

    The rows are `step` apart.
    """
    token = first + tl.arange(0, BLOCK_T)
    channel = tl.arange(0, BLOCK_W)
    inside = (channel < WIDTH)[None, :]
    rows = tl.load(
        new_ptr + token.to(tl.int64)[:, None] * stride_t + channel[None, :],
        mask=(token < num_new)[:, None] & inside,
        other=0.0,
    )
    place = stored + token
    kept = (token < num_new) & (place < capacity)
    tl.store(
        buffer_ptr + place.to(tl.int64)[:, None] * step + channel[None, :],
        rows,
        mask=kept[:, None] & inside,
    )


@triton.jit
def _arrive(counters_ptr):
    """How many programs came here before; all threads of this one have read the counters."""
    tl.debug_barrier()
    # Nothing but the counters passes between programs.
    return tl.atomic_add(counters_ptr + 3, 1, sem="relaxed")


@triton.jit
def _append_one(
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    key_step,
    value_step,
    planes_ptr,
    scale_ptr,
    centre_ptr,
    balance_ptr,
    rotation_ptr,
    codes_ptr,
    ratio_ptr,
    counters_ptr,
    token,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_ONE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REFINE: tl.constexpr,
    SQUARE_STEP: tl.constexpr,
    USUAL_RATIO: tl.constexpr,
):
    """Store and quantise, as `quantize_rotated` does, one token that leaves its group open.

    Nothing that is read depends on what is written, so all of it is asked for first, and memory is
    waited for once: also for how many programs have arrived, which is returned.
    """
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    inside = channel < D
    tile = token // TILE_SIZE
    row_of_tile = token % ROWS
    mark = 1 << (token % TILE_SIZE // ROWS)
    group = token // GROUP
    has_centre = group > 0
    source_ptr = centre_ptr + tl.maximum(group - 1, 0) * D
    word_ptr = planes_ptr + tile * (BITS * ROWS * D) + row_of_tile * D + channel
    row = tl.load(key_ptr + channel, mask=inside, other=0.0)
    value = tl.load(value_ptr + value_channel, mask=value_channel < DV, other=0.0)
    word = tl.load(word_ptr, mask=inside, other=0).to(tl.int32)
    if BITS == 2:
        low_word = tl.load(word_ptr + ROWS * D, mask=inside, other=0).to(tl.int32)
    source = tl.load(source_ptr + channel, mask=inside & has_centre, other=0.0)
    key, centre, balance, matrix = load_factors(
        key_ptr, source_ptr, has_centre, balance_ptr, rotation_ptr, 0, D, BLOCK_D, BLOCK_ONE
    )
    arrived = _arrive(counters_ptr)
    tl.store(keys_ptr + token.to(tl.int64) * key_step + channel, row, mask=inside)
    place_ptr = values_ptr + token.to(tl.int64) * value_step
    tl.store(place_ptr + value_channel, value, mask=value_channel < DV)
    tl.store(centre_ptr + group * D + channel, source, mask=inside)
    total = multiply_factors(key, centre, balance, matrix)
    for first in range(BLOCK_ONE, D, BLOCK_ONE):
        key, centre, balance, matrix = load_factors(
            key_ptr, source_ptr, has_centre, balance_ptr, rotation_ptr, first,
            D, BLOCK_D, BLOCK_ONE,
        )  # fmt: skip
        total += multiply_factors(key, centre, balance, matrix)
    x = (tl.sum(total, axis=0) * NORM).to(tl.float32)
    high, low, scale = encode(x[None, :], D, BITS, THRESHOLD)
    high = tl.reshape(high.to(tl.int32), [BLOCK_D]) * mark
    tl.store(word_ptr, ((word & (mark ^ 0xFFFF)) | high).to(tl.int16), mask=inside)
    if BITS == 2:
        low = tl.reshape(low.to(tl.int32), [BLOCK_D]) * mark
        low_word = (low_word & (mark ^ 0xFFFF)) | low
        tl.store(word_ptr + ROWS * D, low_word.to(tl.int16), mask=inside)
    alone = token + tl.arange(0, 1)
    tl.store(scale_ptr + alone, scale)
    if REFINE > 0:
        store_codes(
            codes_ptr, ratio_ptr, x[None, :], alone, alone >= 0, D, REFINE, SQUARE_STEP, USUAL_RATIO
        )
    return arrived


@triton.jit
def _quantize(
    keys_ptr,
    key_step,
    planes_ptr,
    scale_ptr,
    third_ptr,
    balance_ptr,
    rotation_ptr,
    codes_ptr,
    ratio_ptr,
    row,
    tiles,
    tile,
    start,
    stop,
    INDEX: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ONE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REFINE: tl.constexpr,
    SQUARE_STEP: tl.constexpr,
    USUAL_RATIO: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
):
    """One tile of the index of KV head `row`; `third_ptr` is its centre or zero."""
    planes_ptr += row * tiles * (BITS * ROWS * D)
    third_ptr += row * tiles * (TILE_SIZE // GROUP * D)
    if INDEX == 1:
        if REFINE > 0:
            codes_ptr, ratio_ptr = codes_of(codes_ptr, ratio_ptr, row, tiles, D, REFINE)
        quantize_rotated(
            keys_ptr, key_step, planes_ptr, scale_ptr + row * tiles * TILE_SIZE, third_ptr,
            balance_ptr + row * D, rotation_ptr, codes_ptr, ratio_ptr, tile, start, stop,
            D, BLOCK_D, BLOCK_K, BLOCK_ONE, BITS, GROUP, NORM, THRESHOLD,
            REFINE, SQUARE_STEP, USUAL_RATIO, ONE_BY_ONE,
        )  # fmt: skip
    else:
        scale_ptr += row * tiles * (TILE_SIZE // GROUP * D)
        quantize_fier(
            keys_ptr, key_step, planes_ptr, scale_ptr, third_ptr, tile, start, stop,
            D, BLOCK_D, GROUP,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_new", "capacity", "tiles", "num_heads", "key_stride_b", "key_stride_h",
        "key_stride_t", "value_stride_b", "value_stride_h", "value_stride_t",
    ]
)  # fmt: skip
def append_kernel(
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    planes_ptr,
    scale_ptr,
    third_ptr,
    balance_ptr,
    rotation_ptr,
    codes_ptr,
    ratio_ptr,
    counters_ptr,
    num_new,
    capacity,
    tiles,
    num_heads,
    key_stride_b: tl.int64,
    key_stride_h: tl.int64,
    key_stride_t: tl.int64,
    value_stride_b: tl.int64,
    value_stride_h: tl.int64,
    value_stride_t: tl.int64,
    INDEX: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REFINE: tl.constexpr,
    SQUARE_STEP: tl.constexpr,
    USUAL_RATIO: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Store tokens at the counter, index what is not indexed yet, move the counter on.

    The program that arrives last moves it, when all others have read it. Tokens past the capacity
    are not written, and the counter says so.

    `query_kernel` may start beside it when it changes one token's codes and no centre.
    """
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b = row // num_heads
    h = row % num_heads
    stored = tl.load(counters_ptr).to(tl.int32)
    start = tl.load(counters_ptr + 1).to(tl.int32)
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    keys_ptr, key_step = rows_of(keys_ptr, row, tl.num_programs(1), capacity, D, PAIR)
    values_ptr, value_step = rows_of(values_ptr, row, tl.num_programs(1), capacity, DV, PAIR)
    if INDEX == 0:
        first = part * BLOCK_T
        _store(
            key_ptr, keys_ptr, key_step, key_stride_t, first, num_new, stored, capacity,
            D, BLOCK_D, BLOCK_T,
        )  # fmt: skip
        _store(
            value_ptr, values_ptr, value_step, value_stride_t, first, num_new, stored, capacity,
            DV, BLOCK_DV, BLOCK_T,
        )  # fmt: skip
        arrived = _arrive(counters_ptr)
    elif (
        INDEX == 1
        and num_new == 1
        and start == stored
        and stored < capacity
        and (stored + 1) % GROUP != 0
    ):
        # The usual step.
        if stored % GROUP != 0:
            start_next(IS_EARLY)
        if REFINE > 0:
            codes_ptr, ratio_ptr = codes_of(codes_ptr, ratio_ptr, row, tiles, D, REFINE)
        arrived = _append_one(
            key_ptr, value_ptr, keys_ptr, values_ptr, key_step, value_step,
            planes_ptr + row * tiles * (BITS * ROWS * D),
            scale_ptr + row * tiles * TILE_SIZE,
            third_ptr + row * tiles * (TILE_SIZE // GROUP * D),
            balance_ptr + row * D, rotation_ptr, codes_ptr, ratio_ptr, counters_ptr, stored,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_ONE, BITS, GROUP, NORM, THRESHOLD,
            REFINE, SQUARE_STEP, USUAL_RATIO,
        )  # fmt: skip
    else:
        # Every program of a head stores all of its new tokens: each may quantise any of them.
        for first in range(0, num_new, BLOCK_T):
            _store(
                key_ptr, keys_ptr, key_step, key_stride_t, first, num_new, stored, capacity,
                D, BLOCK_D, BLOCK_T,
            )  # fmt: skip
            _store(
                value_ptr, values_ptr, value_step, value_stride_t, first, num_new, stored, capacity,
                DV, BLOCK_DV, BLOCK_T,
            )  # fmt: skip
        tl.debug_barrier()
        stop = tl.minimum(stored + num_new, capacity)
        first_tile = start // TILE_SIZE
        for tile in range(first_tile + part, tl.cdiv(stop, TILE_SIZE), tl.num_programs(0)):
            _quantize(
                keys_ptr, key_step, planes_ptr, scale_ptr, third_ptr, balance_ptr, rotation_ptr,
                codes_ptr, ratio_ptr, row, tiles, tile, start, stop,
                INDEX, D, BLOCK_D, BLOCK_K, BLOCK_ONE, BITS, GROUP, NORM, THRESHOLD,
                REFINE, SQUARE_STEP, USUAL_RATIO, True,
            )  # fmt: skip
        arrived = _arrive(counters_ptr)
    if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(counters_ptr, (stored + num_new).to(tl.int64))
        if INDEX != 0:
            tl.store(counters_ptr + 1, (stored + num_new).to(tl.int64))
        tl.store(counters_ptr + 3, 0)


@triton.jit(do_not_specialize=["start", "stop", "capacity", "tiles"])
def index_kernel(
    keys_ptr,
    planes_ptr,
    scale_ptr,
    third_ptr,
    balance_ptr,
    rotation_ptr,
    codes_ptr,
    ratio_ptr,
    start,
    stop,
    capacity,
    tiles,
    INDEX: tl.constexpr,
    D: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ONE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REFINE: tl.constexpr,
    SQUARE_STEP: tl.constexpr,
    USUAL_RATIO: tl.constexpr,
):
    """Index tokens ``start .. stop`` of the stored keys, one program a tile and KV head."""
    row = tl.program_id(1).to(tl.int64)
    keys_ptr, key_step = rows_of(keys_ptr, row, tl.num_programs(1), capacity, D, PAIR)
    _quantize(
        keys_ptr, key_step, planes_ptr, scale_ptr, third_ptr, balance_ptr, rotation_ptr,
        codes_ptr, ratio_ptr, row, tiles, start // TILE_SIZE + tl.program_id(0), start, stop,
        INDEX, D, BLOCK_D, BLOCK_K, BLOCK_ONE, BITS, GROUP, NORM, THRESHOLD,
        REFINE, SQUARE_STEP, USUAL_RATIO, False,
    )  # fmt: skip


def append(
    index: KeyIndex | None,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    state: list[Tensor],
    counters: Tensor,
) -> None:
    """Store new tokens behind those stored and, given an index, index all that is not yet.

    Args:
        index: None stores only, as for a prompt or a dense layer.
        key, value: ``[B, H, T, D]`` and ``[B, H, T, Dv]``, last dimension contiguous.
        keys, values: the buffers ``[B, H, C, D]`` and ``[B, H, C, Dv]``, contiguous or paired.
        state: the index's tensors; empty without one.
        counters: int64 ``[4]`` on the device: stored, indexed, calibrated, programs arrived.
    """
    batch_size, num_heads, num_new, head_dim = key.shape
    key, value = as_rows(key), as_rows(value)
    capacity = keys.shape[2]
    if index is None:
        parts, state = triton.cdiv(num_new, _STORE_BLOCK), []
    else:
        parts = 1 if num_new == 1 else triton.cdiv(num_new, TOKENS_PER_TILE) + 1
    grid = (parts, batch_size * num_heads, 1)
    tensors, tiles = state_arguments(index, state), state[0].shape[2] if state else 0
    is_early = isinstance(index, RotatedIndex) and can_start_early(key.device)
    pair = pair_width(keys)
    append_specialization(index, head_dim, value.shape[3], key.dtype, pair, is_early).launch(
        grid, key, value, keys, values, *tensors, counters, num_new, capacity, tiles, num_heads,
        *key.stride()[:3], *value.stride()[:3],
    )  # fmt: skip


def index_range(index: KeyIndex, keys: Tensor, state: list[Tensor], start: int, stop: int) -> None:
    """Index tokens ``start .. stop`` of the buffer ``keys [B, H, C, D]``: `KeyIndex.append`.

    Keys that are neither contiguous nor of paired rows, as a model makes them, are copied.
    """
    if start >= stop:
        return
    batch_size, num_heads, capacity, _ = keys.shape
    if not is_laid_out(keys):
        keys = keys.contiguous()
    first_tile = start // TOKENS_PER_TILE
    grid = (triton.cdiv(stop, TOKENS_PER_TILE) - first_tile, batch_size * num_heads, 1)
    index_specialization(index, keys.dtype, pair_width(keys)).launch(
        grid, keys, *state_arguments(index, state), start, stop, capacity, state[0].shape[2]
    )


def kind(index: KeyIndex) -> int:
    """Which of the indexes that kernels know this one is.

    Raises:
        TypeError: none of them.
    """
    if isinstance(index, RotatedIndex):
        return ROTATED
    if isinstance(index, FierIndex):
        return FIER
    raise TypeError(f"no kernel reads the index {index}")


def state_arguments(index: KeyIndex | None, state: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The state as kernels take it: seven tensors, None for what an index does not have.

    Planes, scale, centre or zero, balance, rotation, codes, ratio.
    """
    if isinstance(index, RotatedIndex):
        planes, scale, centre, balance, *codes, rotation = state
        return (planes, scale, centre, balance, rotation, *(codes or (None, None)))
    return (*state, *(None,) * (7 - len(state)))


@cache
def append_specialization(
    index: KeyIndex | None,
    head_dim: int,
    value_head_dim: int,
    dtype: torch.dtype,
    pair: int,
    is_early: bool,
) -> Specialization:
    """Of `append_kernel`."""
    constants = {
        **_common_constants(index, head_dim),
        "DV": value_head_dim,
        "PAIR": pair,
        "BLOCK_DV": triton.next_power_of_2(value_head_dim),
        "BLOCK_T": _STORE_BLOCK if index is None else _INDEX_BLOCK,
        "IS_EARLY": is_early,
    }
    return Specialization(append_kernel, constants, num_warps=8)


@cache
def index_specialization(index: KeyIndex, dtype: torch.dtype, pair: int) -> Specialization:
    """Of `index_kernel`."""
    constants = {**_common_constants(index, index.head_dim), "PAIR": pair}
    # With 4 warps two programs share a multiprocessor, and one works while the other waits.
    is_small = index.head_dim <= 128 and constants["BITS"] == 1 and not constants["REFINE"]
    num_warps = 4 if is_small else 8
    return Specialization(index_kernel, constants, num_warps=num_warps)


def _common_constants(index: KeyIndex | None, head_dim: int) -> dict[str, Any]:
    block_d = triton.next_power_of_2(head_dim)
    refine_bits = index.refine_bits if isinstance(index, RotatedIndex) else 0
    refinement = Refinement(head_dim, refine_bits) if refine_bits else None
    return {
        "INDEX": NO_INDEX if index is None else kind(index),
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_K": min(16, block_d),
        "BLOCK_ONE": min(128 if block_d < 256 else 64, block_d),
        "BITS": index.bits if isinstance(index, RotatedIndex) else 1,
        "GROUP": 32 if index is None else index.group_size,
        "NORM": rotation_norm(head_dim),
        "THRESHOLD": TWO_BIT_THRESHOLD,
        "REFINE": refine_bits,
        "SQUARE_STEP": refinement.square_step if refinement else 0.0,
        "USUAL_RATIO": refinement.usual_ratio if refinement else 0.0,
    }


def new_counters(device: torch.device) -> Tensor:
    """Counters of an empty layer: see `append`."""
    return torch.zeros(4, dtype=torch.int64, device=device)
