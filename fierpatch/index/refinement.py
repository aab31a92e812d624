"""Codes of more bits for the few tokens that are scored again: all magnitudes, a scale a token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The step of a uniform quantiser of a normal variable with the least squared error, in units of its
# deviation, by bits in all (Max, 1960).
STEPS = {2: 0.996, 3: 0.586, 4: 0.335}
REFINE_BITS = tuple(STEPS)
NUM_CODES = 2  # tensors of a state
HALF = 0x3F00  # the upper 16 bits of 0.5 in float32, where a ratio's byte begins


@dataclass(frozen=True)
class Refinement:
    """The magnitudes of a rotated key in levels, where its signs are known.

    Of ``x`` with deviation ``s = |x| / sqrt(D)`` each magnitude is a level ``u``, of those at
    ``(u + 1/2) step s``, in ``bits - 1`` bits. Signs and levels are ``b = +-(u + 1/2)``, and as
    with one bit ``<a b, x> = |x|^2`` for the scale ``a``. One byte has its ratio to the one-bit
    scale, which never is far from ``step / sqrt(pi / 2)``: between half and twice that, the upper
    16 bits of a float32 count on from those of 0.5.

    Behind the sign as its highest bit, set where x >= 0, a code is a whole number that counts up
    from the lowest level: ``b + (2^bits - 1) / 2``. A score is then a sum over planes of bits.
    codes are uint8 ``[B, H, tiles, 512, (bits - 1) D / 8]``: without the signs, a token's bytes
    together, its highest plane first; channel c is bit ``c % 8`` of byte ``c // 8`` of a plane.
    ratio is uint8 ``[B, H, tiles, 512, 1]``.

    Args:
        head_dim: D, a multiple of 8.
        bits: in all, 2 to 4.
    """

    head_dim: int
    bits: int

    @property
    def bytes_per_token(self) -> int:
        """``(bits - 1) D / 8 + 1``."""
        return self.code_size + 1

    @property
    def code_size(self) -> int:
        """Bytes of a token's levels."""
        return (self.bits - 1) * -(-self.head_dim // 8)

    def allocate(
        self, lead: tuple[int, int], tiles: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Codes and ratios of no tokens."""
        size = (*lead, tiles, 512)
        return (
            torch.zeros(*size, self.code_size, dtype=torch.uint8, device=device),
            torch.zeros(*size, 1, dtype=torch.uint8, device=device),
        )

    def encode(
        self, is_high: Tensor, magnitude: Tensor, energy: Tensor, overlap: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes and ratios of rotated keys.

        Args:
            is_high: bool ``[B, H, n, D]``, the signs.
            magnitude: float64 ``[B, H, n, D]``.
            energy: float64 ``[B, H, n]``, the sums of their squares.
            overlap: float64 ``[B, H, n]``, their sums, which is what they have in common with the
                signs.
        """
        step = (energy * self.square_step).sqrt().float().unsqueeze(-1)
        level = torch.zeros_like(magnitude, dtype=torch.uint8)
        # By comparisons with float32 numbers, as magnitudes are: no two devices decide them apart.
        for least in range(1, 1 << (self.bits - 1)):
            level += magnitude >= (least * step).double()
        # Both scales are the energy over an overlap: that of the signs, and that of the levels.
        own = ((magnitude * (level.double() + 0.5)).sum(-1) * self.usual_ratio).float()
        ratio = torch.where(own > 0, overlap.float() / own, 1.0)
        byte = ((ratio.view(torch.int32) + 0x8000) >> 16) - HALF
        code = torch.where(is_high, level, ~level)
        bits = [(code >> bit) & 1 for bit in reversed(range(self.bits - 1))]
        return _pack(torch.stack(bits, dim=-2)), byte.clamp(0, 255).byte().unsqueeze(-1)

    def decode(self, is_high: Tensor, codes: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """``b`` of tokens, float32 ``[B, H, n, D]``, and ``a`` over their one-bit scales."""
        bits = _unpack(codes.unflatten(-1, (self.bits - 1, -1)), self.head_dim)
        code = is_high.float()
        for bit in range(self.bits - 1):
            code = 2 * code + bits[..., bit, :]
        upper_half = ratio.squeeze(-1).int() + HALF
        own = (upper_half << 16).view(torch.float32) * self.usual_ratio
        return code - (2**self.bits - 1) / 2, own

    @property
    def square_step(self) -> float:
        """Of the levels, for an energy of 1."""
        return STEPS[self.bits] ** 2 / self.head_dim

    @property
    def usual_ratio(self) -> float:
        """Of the two scales, for a normal variable."""
        return STEPS[self.bits] / math.sqrt(math.pi / 2)


def _pack(bits: Tensor) -> Tensor:
    """Bits ``[..., planes, D]`` as bytes ``[..., planes * ceil(D / 8)]``."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (padded << shifts).sum(-1, dtype=torch.uint8).flatten(-2)


def _unpack(packed: Tensor, head_dim: int) -> Tensor:
    """Bytes ``[..., planes, ceil(D / 8)]`` as bits ``[..., planes, D]``."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :head_dim]
