"""Numbers that several kernels are written with."""

from __future__ import annotations

import math

import triton.language as tl

from fierpatch import hot_set
from fierpatch.index import base, packing, refinement

TILE_SIZE = tl.constexpr(packing.TILE_SIZE)
ROWS = tl.constexpr(packing.ROWS)
FLOAT16_MAX = tl.constexpr(base.FLOAT16_MAX)
MAX_HEADS = tl.constexpr(8)  # that a program scores; the matrix units want as many columns
EXPONENTS = tl.constexpr(64)  # that a key of the selection tells apart
MANTISSA_BITS = tl.constexpr(8)  # of such a key, its lowest
MANTISSAS = tl.constexpr(1 << MANTISSA_BITS.value)
HALF = tl.constexpr(refinement.HALF)
LOG2_E = tl.constexpr(math.log2(math.e))
EMPTY = tl.constexpr(hot_set.EMPTY)
MISSING = tl.constexpr(hot_set.MISSING)
OLDEST = tl.constexpr(hot_set.OLDEST)
# Columns of a tally.
CLOCK = tl.constexpr(hot_set.CLOCK)
USED = tl.constexpr(hot_set.USED)
MISSED = tl.constexpr(hot_set.MISSED)
PREFETCHED = tl.constexpr(hot_set.PREFETCHED)
ASKED = tl.constexpr(hot_set.ASKED)
USEFUL = tl.constexpr(hot_set.USEFUL)
NEEDED = tl.constexpr(hot_set.NEEDED)
NUM_COUNTS = tl.constexpr(hot_set.NUM_COUNTS)
