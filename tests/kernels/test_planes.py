"""A bit plane is exact as float16, subnormal or not."""

from __future__ import annotations

import torch

from kernels.plane_sums import check_planes


def test_all_16_bits_of_a_word_are_exact_float16_operands() -> None:
    check_planes(torch.device("cpu"))
