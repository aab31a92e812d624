"""The fixed orthogonal rotation of the rotated index: random signs, then a fast transform.

For a head_dim of ``m * 2**k`` with m odd, the rotation is a Hadamard transform over the 2**k part
and, where m > 1, a Householder reflection over the m part. Every step is an elementwise sum in a
fixed order, so the same key gives the same bits on any device and in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_signs(head_dim: int, seed: int) -> Tensor:
    """A float32 ``[D]`` vector of +1 and -1, the same on every machine for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (head_dim,), generator=generator).mul(2).sub(1).float()


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Rotate the last dimension of ``[..., D]``; the Euclidean norm stays.

    Args:
        x: float tensor ``[..., D]``.
        signs: ``[D]`` from `random_signs`.
    """
    head_dim = x.shape[-1]
    power = head_dim & -head_dim  # the largest power of two that divides head_dim
    odd = head_dim // power
    x = (x * signs).unflatten(-1, (odd, power))
    if odd > 1:
        total = x[..., 0, :]
        for part in range(1, odd):
            total = total + x[..., part, :]
        x = x - (2.0 / odd) * total.unsqueeze(-2)
    span = 1
    while span < power:
        pairs = x.unflatten(-1, (power // (2 * span), 2, span))
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        span *= 2
    return x.flatten(-2) * power**-0.5


def rotation_matrix(signs: Tensor) -> Tensor:
    """The matrix ``[D, D]`` for which ``rotate(x) == x @ matrix`` up to rounding."""
    return rotate(torch.eye(signs.shape[0], dtype=signs.dtype, device=signs.device), signs)


def halving_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over one dimension by adding halves, in an order that no batch or device changes."""
    while (size := x.shape[dim]) > 1:
        half = size // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = folded if size % 2 == 0 else torch.cat((folded, x.narrow(dim, size - 1, 1)), dim)
    return x.squeeze(dim)
