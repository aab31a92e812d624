"""The fixed orthogonal rotation of the rotated index: random signs, then a Hadamard transform.

For a head_dim of ``m * 2**k`` with m odd, the transform is Hadamard over the 2**k part and, where
m > 1, a Householder reflection over the m part. Its matrix is kept unnormalised, as small integers,
and applied in float64, where float32 terms add up exactly unless they span six decades: so the
same key gives the same bits on any device, in any batch, alone or among others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_matrix(head_dim: int, seed: int) -> Tensor:
    """The rotation times `rotation_norm`, integers ``[D, D]``, the same on every machine.

    int8 but for a head_dim with an odd factor past 128, where it is int32. Rows multiply from the
    left: see `rotate`.
    """
    power, odd = _factors(head_dim)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        top, bottom = torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)
        hadamard = torch.cat((top, bottom), 0)
    if odd > 1:
        identity = torch.eye(odd, dtype=torch.float64)
        hadamard = torch.kron(odd * identity - 2.0, hadamard)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (head_dim, 1), generator=generator) * 2 - 1
    return (signs * hadamard).to(torch.int8 if odd < 129 else torch.int32)


def rotation_norm(head_dim: int) -> float:
    """What makes `rotation_matrix` orthogonal when it is multiplied by it."""
    power, odd = _factors(head_dim)
    return float(power**-0.5 / odd)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotate the last dimension of ``[..., D]``; the Euclidean norm stays.

    Args:
        x: float tensor ``[..., D]``.
        matrix: from `rotation_matrix`, on the device of `x`.
    """
    return ((x.double() @ matrix.double()) * rotation_norm(matrix.shape[0])).to(x.dtype)


def _factors(head_dim: int) -> tuple[int, int]:
    """The largest power of two that divides head_dim, and what is left."""
    power = head_dim & -head_dim
    return power, head_dim // power
