"""The check of `planes.py` for either device."""

from __future__ import annotations

import torch


def check_planes(device: torch.device) -> None:
    """Sums over the set bits of each plane are whole numbers, and exactly those."""
    from kernels.planes import plane_sums_kernel

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**15), 2**15, (32, 64), generator=generator).to(torch.int16)
    words[0], words[1] = 0, -1
    operand = torch.randint(-2048, 2049, (64, 16), generator=generator).half()
    sums = torch.empty(16, 32, 16, device=device)
    plane_sums_kernel[(1,)](words.to(device), operand.to(device), sums, D=64)
    for plane in range(16):
        is_set = (words.int() >> plane & 1).double()
        assert torch.equal(sums[plane].cpu().double(), 2 * is_set @ operand.double())
