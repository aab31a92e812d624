"""Numbers that several kernels are written with."""

from __future__ import annotations

import math

import triton.language as tl

from fierpatch.index import base, packing

TILE_SIZE = tl.constexpr(packing.TILE_SIZE)
ROWS = tl.constexpr(packing.ROWS)
FLOAT16_MAX = tl.constexpr(base.FLOAT16_MAX)
EXPONENTS = tl.constexpr(64)  # that a key of the selection tells apart
MANTISSAS = tl.constexpr(256)
LOG2_E = tl.constexpr(math.log2(math.e))
