"""Quantising keys into an index, one program for a tile of 512 tokens.

Each function of this file does for one tile of one KV head what ``append`` of the index of the same
name does, and leaves the same state, bit for bit: sums that decide a bit are taken in float64,
where they are exact in any order. Pointers are those of the KV head; `key_step` is from a token's
key to the next one's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fierpatch.kernels.constants import FLOAT16_MAX, HALF, ROWS, TILE_SIZE


@triton.jit
def finite(x):
    """Keys as float32 with NaN as 0 and magnitudes kept within float16."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX)


@triton.jit
def to_half(x):
    """Round to float16, saturating instead of overflowing."""
    return tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)


@triton.jit
def load_keys(keys_ptr, key_step, token, channel, first, stop, D: tl.constexpr):
    """Keys ``[tokens, channels]`` as `finite` float32; 0 outside ``first .. stop``."""
    valid = (token >= first) & (token < stop)
    mask = valid[:, None] & (channel < D)[None, :]
    rows = keys_ptr + token[:, None] * key_step
    return finite(tl.load(rows + channel[None, :], mask=mask, other=0.0))


@triton.jit
def merge_words(words_ptr, words, written, channel, D: tl.constexpr):
    """Put the bits that `written` marks into a tile's words and leave the others alone.

    Shapes: words int32 ``[32, BLOCK_D]``, written int32 ``[32]``.
    """
    row = tl.arange(0, ROWS)
    address = words_ptr + row[:, None] * D + channel[None, :]
    mask = (written != 0)[:, None] & (channel < D)[None, :]
    old = tl.load(address, mask=mask, other=0).to(tl.int32)
    merged = (old & (written ^ 0xFFFF)[:, None]) | words
    tl.store(address, merged.to(tl.int16), mask=mask)


@triton.jit
def group_mean(
    keys_ptr, key_step, group, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The mean of a whole group as float16 ``[BLOCK_D]``."""
    channel = tl.arange(0, BLOCK_D)
    row = tl.arange(0, ROWS)
    total = tl.zeros([BLOCK_D], tl.float64)
    first = group * GROUP
    for start in range(first, first + GROUP, ROWS):
        x = load_keys(keys_ptr, key_step, start + row, channel, first, first + GROUP, D)
        total += tl.sum(x.to(tl.float64), axis=0)
    return to_half((total / GROUP).to(tl.float32))


@triton.jit
def rotate_keys(
    keys_ptr,
    key_step,
    centre_ptr,
    has_centre,
    balance_ptr,
    rotation_ptr,
    start,
    first,
    stop,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """``R (d * (k - mu))`` of 32 tokens from `start` on: float32 ``[32, BLOCK_D]``.

    Both operands of the product are carried through the loop, because Triton 3.6 cannot lay out a
    float64 operand that it sees converted from a narrower load.
    """
    token = start + tl.arange(0, ROWS)
    out = tl.arange(0, BLOCK_D)
    channel = tl.arange(0, BLOCK_K)
    total = tl.zeros([ROWS, BLOCK_D], tl.float64)
    x = tl.zeros([ROWS, BLOCK_K], tl.float64)
    matrix = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    for c in range(0, D + BLOCK_K, BLOCK_K):
        total = tl.dot(x, matrix, total, out_dtype=tl.float64)
        cs = c + channel
        inside = cs < D
        keys = load_keys(keys_ptr, key_step, token, cs, first, stop, D)
        centre = tl.load(centre_ptr + cs, mask=inside & has_centre, other=0.0).to(tl.float32)
        balance = tl.load(balance_ptr + cs, mask=inside, other=0.0)
        x = ((keys - centre[None, :]) * balance[None, :]).to(tl.float64)
        mask = inside[:, None] & (out < D)[None, :]
        rows = rotation_ptr + cs[:, None] * D + out[None, :]
        matrix = tl.load(rows, mask=mask, other=0).to(tl.float64)
    return (total * NORM).to(tl.float32)


@triton.jit
def load_factors(
    key_ptr,
    centre_ptr,
    has_centre,
    balance_ptr,
    rotation_ptr,
    first,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Key, centre and balance in BLOCK_K channels from `first` on, and their rows of the matrix."""
    channel = first + tl.arange(0, BLOCK_K)
    out = tl.arange(0, BLOCK_D)
    inside = channel < D
    key = tl.load(key_ptr + channel, mask=inside, other=0.0)
    centre = tl.load(centre_ptr + channel, mask=inside & has_centre, other=0.0)
    balance = tl.load(balance_ptr + channel, mask=inside, other=0.0)
    rows = rotation_ptr + channel[:, None] * D + out[None, :]
    matrix = tl.load(rows, mask=inside[:, None] & (out < D)[None, :], other=0)
    return key, centre, balance, matrix


@triton.jit
def multiply_factors(key, centre, balance, matrix):
    """What `load_factors` add to each rotated channel: float64 ``[BLOCK_K, BLOCK_D]``."""
    x = (finite(key) - centre.to(tl.float32)) * balance
    return x.to(tl.float64)[:, None] * matrix.to(tl.float64)


@triton.jit
def rotate_key(
    key_ptr,
    centre_ptr,
    has_centre,
    balance_ptr,
    rotation_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """`rotate_keys` for one token without the matrix product: float32 ``[BLOCK_D]``."""
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    for first in range(0, D, BLOCK_K):
        key, centre, balance, matrix = load_factors(
            key_ptr, centre_ptr, has_centre, balance_ptr, rotation_ptr, first, D, BLOCK_D, BLOCK_K
        )
        total += multiply_factors(key, centre, balance, matrix)
    return (tl.sum(total, axis=0) * NORM).to(tl.float32)


@triton.jit
def encode(x, D: tl.constexpr, BITS: tl.constexpr, THRESHOLD: tl.constexpr):
    """Levels and scale of rotated keys ``[n, BLOCK_D]``: high and low bits, float16 ``[n]``."""
    high = x >= 0
    magnitude = tl.abs(x).to(tl.float64)
    energy = tl.sum(magnitude * magnitude, axis=1)
    if BITS == 1:
        low = high
        overlap = tl.sum(magnitude, axis=1)
    else:
        threshold = THRESHOLD * tl.sqrt(energy / D)
        outer = magnitude > threshold[:, None]
        low = high == outer
        overlap = tl.sum(tl.where(outer, 3.0 * magnitude, magnitude), axis=1)
    scale = tl.where(overlap > 0, energy / tl.where(overlap > 0, overlap, 1.0), 0.0)
    return high, low, to_half(scale.to(tl.float32))


@triton.jit
def codes_of(codes_ptr, ratio_ptr, row, tiles, D: tl.constexpr, REFINE: tl.constexpr):
    """The codes and ratios of KV head `row`."""
    CODE: tl.constexpr = (REFINE - 1) * ((D + 7) // 8)
    return codes_ptr + row * tiles * (TILE_SIZE * CODE), ratio_ptr + row * tiles * TILE_SIZE


@triton.jit
def store_codes(
    codes_ptr,
    ratio_ptr,
    x,
    token,
    valid,
    D: tl.constexpr,
    REFINE: tl.constexpr,
    SQUARE_STEP: tl.constexpr,
    USUAL_RATIO: tl.constexpr,
):
    """What `Refinement.encode` makes of rotated keys ``[n, BLOCK_D]``, as rows ``token [n]``."""
    channel = tl.arange(0, x.shape[1])
    size = tl.abs(x)
    magnitude = size.to(tl.float64)
    energy = tl.sum(magnitude * magnitude, axis=1)
    step = tl.sqrt(energy * SQUARE_STEP).to(tl.float32)
    # Triton lays a tensor of one number out badly.
    step = tl.sum(step, axis=0) if x.shape[0] == 1 else step[:, None]
    # The level is found a bit at a time, the highest first.
    level = tl.zeros(x.shape, tl.float32)
    for bit in tl.static_range(REFINE - 2, -1, -1):
        higher = level + (1 << bit)
        level = tl.where(size >= higher * step, higher, level)
    overlap = tl.sum(magnitude * (level + 0.5).to(tl.float64), axis=1)
    # Both scales are the energy over an overlap: that of the signs, and that of the levels.
    overlap = (overlap * USUAL_RATIO).to(tl.float32)
    signs = tl.sum(magnitude, axis=1).to(tl.float32)
    ratio = tl.where(overlap > 0, tl.div_rn(signs, tl.where(overlap > 0, overlap, 1.0)), 1.0)
    byte = ((ratio.to(tl.int32, bitcast=True) + 0x8000) >> 16) - HALF
    byte = tl.minimum(tl.maximum(byte, 0), 255)
    tl.store(ratio_ptr + token, byte.to(tl.uint8), mask=valid)
    # As whole numbers that count up from the lowest level.
    code = level.to(tl.int32)
    code = tl.where(x >= 0, code, (1 << (REFINE - 1)) - 1 - code)
    code = tl.where((channel < D)[None, :], code, 0)
    # Bits 0, 1 and 2 come to stand 0, 8 and 16, so that eight channels make a byte of each plane.
    spread = (code * 0x4081) & 0x010101
    spread = tl.reshape(spread, [x.shape[0], x.shape[1] // 8, 8])
    planes = tl.sum(spread << tl.arange(0, 8)[None, None, :], axis=2)
    PLANE: tl.constexpr = (D + 7) // 8
    PLANES: tl.constexpr = REFINE - 1
    byte = tl.arange(0, x.shape[1] // 8)[None, None, :]
    # The highest first, and as many as a power of two.
    plane = tl.arange(0, 4 if PLANES == 3 else PLANES)[None, :, None]
    bits = planes[:, None, :] >> tl.maximum(8 * (PLANES - 1 - plane), 0)
    place = token.to(tl.int64)[:, None, None] * (PLANES * PLANE) + plane * PLANE + byte
    mask = valid[:, None, None] & (plane < PLANES) & (byte < PLANE)
    tl.store(codes_ptr + place, bits.to(tl.uint8), mask=mask)


@triton.jit
def quantize_rotated(
    keys_ptr,
    key_step,
    planes_ptr,
    scale_ptr,
    centre_ptr,
    balance_ptr,
    rotation_ptr,
    codes_ptr,
    ratio_ptr,
    tile,
    start,
    stop,
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
    """Tokens ``start .. stop`` of one tile; `ONE_BY_ONE` suits a group that gains few tokens."""
    channel = tl.arange(0, BLOCK_D)
    row = tl.arange(0, ROWS)
    inside = channel < D
    words_ptr = planes_ptr + tile * (BITS * ROWS * D)
    words = tl.zeros([ROWS, BLOCK_D], tl.int32)
    low_words = tl.zeros([ROWS, BLOCK_D], tl.int32)
    written = tl.zeros([ROWS], tl.int32)
    end = tl.minimum(tile * TILE_SIZE + TILE_SIZE, stop)
    has_words = False
    for group in range(tl.maximum(tile * TILE_SIZE, start) // GROUP, tl.cdiv(end, GROUP)):
        opening = group * GROUP
        is_sealed = opening + GROUP <= stop
        # An open group borrows the centre of the one before; the first borrows zero.
        source_ptr = centre_ptr + tl.maximum(group - 1, 0) * D
        has_centre = group > 0
        if is_sealed or opening > start:
            # Where the group before was sealed in this launch, it may be another program's.
            own = tl.where(is_sealed, group, group - 1)
            centre = group_mean(keys_ptr, key_step, own, D, GROUP, BLOCK_D)
            source_ptr = centre_ptr + group * D
            has_centre = True
        else:
            centre = tl.load(source_ptr + channel, mask=inside & has_centre, other=0.0)
        tl.store(centre_ptr + group * D + channel, centre, mask=inside)
        first = tl.where(is_sealed, opening, tl.maximum(start, opening))
        last = tl.minimum(opening + GROUP, stop)
        if ONE_BY_ONE and not is_sealed:
            if opening > start:
                tl.debug_barrier()
            for token in range(first, last):
                x = rotate_key(
                    keys_ptr + token * key_step, source_ptr, has_centre, balance_ptr, rotation_ptr,
                    D, BLOCK_D, BLOCK_ONE, NORM,
                )  # fmt: skip
                high, low, scale = encode(x[None, :], D, BITS, THRESHOLD)
                place = token - tile * TILE_SIZE
                plane = place // ROWS
                marks = tl.where(row == place % ROWS, 1 << plane, 0)
                merge_words(words_ptr, high.to(tl.int32) * marks[:, None], marks, channel, D)
                if BITS == 2:
                    low_marks = low.to(tl.int32) * marks[:, None]
                    merge_words(words_ptr + ROWS * D, low_marks, marks, channel, D)
                alone = token + tl.arange(0, 1)
                tl.store(scale_ptr + alone, scale)
                if REFINE > 0:
                    store_codes(
                        codes_ptr, ratio_ptr, x[None, :], alone, alone >= 0,
                        D, REFINE, SQUARE_STEP, USUAL_RATIO,
                    )  # fmt: skip
                tl.debug_barrier()
        else:
            has_words = True
            tl.debug_barrier()
            for start_of_plane in range(first // ROWS * ROWS, last, ROWS):
                x = rotate_keys(
                    keys_ptr, key_step, source_ptr, has_centre, balance_ptr, rotation_ptr,
                    start_of_plane, first, last, D, BLOCK_D, BLOCK_K, NORM,
                )  # fmt: skip
                high, low, scale = encode(x, D, BITS, THRESHOLD)
                plane = (start_of_plane - tile * TILE_SIZE) // ROWS
                token = start_of_plane + row
                valid = (token >= first) & (token < last)
                marks = tl.where(valid, 1 << plane, 0)
                written |= marks
                words |= high.to(tl.int32) * marks[:, None]
                if BITS == 2:
                    low_words |= low.to(tl.int32) * marks[:, None]
                tl.store(scale_ptr + token, scale, mask=valid)
                if REFINE > 0:
                    store_codes(
                        codes_ptr, ratio_ptr, x, token, valid,
                        D, REFINE, SQUARE_STEP, USUAL_RATIO,
                    )  # fmt: skip
    if has_words:
        tl.debug_barrier()
        merge_words(words_ptr, words, written, channel, D)
        if BITS == 2:
            merge_words(words_ptr + ROWS * D, low_words, written, channel, D)


@triton.jit
def quantize_fier(
    keys_ptr,
    key_step,
    planes_ptr,
    scale_ptr,
    zero_ptr,
    tile,
    start,
    stop,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tokens ``start .. stop`` of one tile, and those of the group that was open."""
    channel = tl.arange(0, BLOCK_D)
    row = tl.arange(0, ROWS)
    inside = channel < D
    words = tl.zeros([ROWS, BLOCK_D], tl.int32)
    written = tl.zeros([ROWS], tl.int32)
    end = tl.minimum(tile * TILE_SIZE + TILE_SIZE, stop)
    for group in range(tl.maximum(tile * TILE_SIZE, start) // GROUP, tl.cdiv(end, GROUP)):
        opening = group * GROUP
        last = tl.minimum(opening + GROUP, stop)
        least = tl.full([BLOCK_D], FLOAT16_MAX, tl.float32)
        most = tl.full([BLOCK_D], -FLOAT16_MAX, tl.float32)
        for start_of_plane in range(opening, last, ROWS):
            token = start_of_plane + row
            x = load_keys(keys_ptr, key_step, token, channel, opening, last, D)
            valid = (token < last)[:, None]
            least = tl.minimum(least, tl.min(tl.where(valid, x, FLOAT16_MAX), axis=0))
            most = tl.maximum(most, tl.max(tl.where(valid, x, -FLOAT16_MAX), axis=0))
        middle = (most + least) / 2
        tl.store(zero_ptr + group * D + channel, to_half(middle), mask=inside)
        tl.store(scale_ptr + group * D + channel, to_half((most - least) / 2), mask=inside)
        for start_of_plane in range(opening, last, ROWS):
            token = start_of_plane + row
            x = load_keys(keys_ptr, key_step, token, channel, opening, last, D)
            plane = (start_of_plane - tile * TILE_SIZE) // ROWS
            marks = tl.where(token < last, 1 << plane, 0)
            written |= marks
            words |= (x >= middle[None, :]).to(tl.int32) * marks[:, None]
    merge_words(planes_ptr + tile * (ROWS * D), words, written, channel, D)
