"""The balanced rotated index: one or two bits a rotated channel and one scale a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fierpatch.errors import ConfigError
from fierpatch.index.base import check_group_size, finite_keys, to_float16
from fierpatch.index.packing import ROWS, TILE_SIZE, num_tiles, plane_dot, read_bits, write_bits
from fierpatch.index.refinement import NUM_CODES, REFINE_BITS, Refinement
from fierpatch.index.rotation import rotate, rotation_matrix

# Levels -3, -1, 1, 3 with the step at 0.9816 sigma: the 4-level uniform-ratio quantiser of a normal
# variable with the least squared error (Max, 1960).
TWO_BIT_THRESHOLD = 0.9816
MIN_CALIBRATION_TOKENS = 128
_CALIBRATION_GROUPS = 32
_TOKENS_AT_ONCE = 8192  # bounds the temporaries of a long append


@dataclass(frozen=True)
class RotatedIndex:
    """Sign bits of balanced, rotated, centred keys, unbiased by one scale a token.

    With ``mu`` the mean of the token's group, ``d`` the balance of the channels and ``R`` a fixed
    rotation: ``x = R (d * (k - mu))`` is stored as levels ``b`` (its signs for 1 bit, -3 -1 1 3 for
    2) and ``a = |x|^2 / <x, b>``, so that ``<a b, x> = |x|^2`` as in RaBitQ (arXiv 2405.12497).
    Then ``q . k`` is estimated by ``a (R (q / d)) . b + q . mu``. The balance
    ``d_c = (E q_c^2 / E (k_c - mu_c)^2)^(1/4)`` makes the noise of an isotropic quantiser least.

    With `refine_bits` every token also has levels of as many bits in all, see `Refinement`, for the
    few tokens that are scored again.

    An open group borrows the mean of the last sealed one (the first borrows zero) and is quantised
    again with its own when it fills.

    The state is planes int16 ``[B, H, tiles, bits * 32, D]`` (the high bit's 32 rows first), scale
    float16 ``[B, H, tiles, 512]``, centre float16 ``[B, H, tiles, 512 / group_size, D]``, balance
    float32 ``[B, H, D]``, the refinement's codes where there are any, and one constant, the
    rotation's integer matrix ``[D, D]``.
    """

    head_dim: int
    bits: int = 1
    group_size: int = 128
    seed: int = 0
    refine_bits: int = 0

    num_constants: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if self.bits not in (1, 2):
            raise ConfigError(f"bits={self.bits} is not available: choose 1 or 2")
        if self.refine_bits not in (0, *REFINE_BITS) or (self.refine_bits and self.bits != 1):
            raise ConfigError(
                f"refine_bits={self.refine_bits} is not available for bits={self.bits}: choose 0, "
                "or 2, 3 or 4 beside 1 bit"
            )

    @property
    def candidate_margin(self) -> float:
        """See `KeyIndex`: twice the standard error, of one bit and of two."""
        return {1: 1.3, 2: 0.75}[self.bits]

    @property
    def tiled(self) -> tuple[bool, ...]:
        """Which tensors of the state have their tiles on axis 2."""
        return (True, True, True, False, *(True,) * (NUM_CODES if self.refine_bits else 0), False)

    @property
    def refinement(self) -> Refinement:
        """The codes beside the bits.

        Raises:
            ConfigError: this index has none.
        """
        if not self.refine_bits:
            raise ConfigError(f"{self} has no codes to refine by: make it with refine_bits")
        return Refinement(self.head_dim, self.refine_bits)

    @property
    def bytes_per_token(self) -> float:
        """Bits, a float16 scale, the centre ``2 D / group_size``, and the refinement's codes."""
        codes = self.refinement.bytes_per_token if self.refine_bits else 0
        return self.scanned_bytes_per_token + codes

    @property
    def scanned_bytes_per_token(self) -> float:
        """What `scores` reads of it: ``bits D / 8 + 2 + 2 D / group_size``."""
        return self.bits * self.head_dim / 8 + 2 + 2 * self.head_dim / self.group_size

    @property
    def refined_bytes_per_token(self) -> float:
        """The codes, the signs among the bits, and the scale, 0 without codes."""
        if not self.refine_bits:
            return 0.0
        return self.refinement.bytes_per_token + self.head_dim / 8 + 2

    def allocate(
        self, batch_size: int, num_kv_heads: int, num_tokens: int, device: torch.device
    ) -> list[Tensor]:
        """An empty state with room for `num_tokens` tokens, rounded up to tiles of 512."""
        lead = (batch_size, num_kv_heads)
        tiles = num_tiles(num_tokens)
        rows, groups = self.bits * ROWS, TILE_SIZE // self.group_size
        return [
            torch.zeros(*lead, tiles, rows, self.head_dim, dtype=torch.int16, device=device),
            torch.zeros(*lead, tiles, TILE_SIZE, dtype=torch.float16, device=device),
            torch.zeros(*lead, tiles, groups, self.head_dim, dtype=torch.float16, device=device),
            torch.ones(*lead, self.head_dim, device=device),
            *(self.refinement.allocate(lead, tiles, device) if self.refine_bits else ()),
            rotation_matrix(self.head_dim, self.seed).to(device),
        ]

    def append(self, state: list[Tensor], keys: Tensor, start: int, stop: int) -> None:
        """Index tokens ``start .. stop`` of ``keys [B, H, C, D]``; seal the groups that fill."""
        centre = state[2].view(*state[2].shape[:2], -1, self.head_dim)
        group, sealed_groups = start // self.group_size, stop // self.group_size
        at_once = max(_TOKENS_AT_ONCE // self.group_size, 1)
        for first in range(group, sealed_groups, at_once):
            last = min(first + at_once, sealed_groups)
            tokens = slice(first * self.group_size, last * self.group_size)
            groups = finite_keys(keys[:, :, tokens]).unflatten(2, (-1, self.group_size))
            mean = to_float16(groups.double().mean(3).float())
            centre[:, :, first:last] = mean
            centred = groups - mean.float().unsqueeze(3)
            self._quantize(state, centred.flatten(2, 3), tokens.start)
        start = max(start, sealed_groups * self.group_size)
        if start < stop:
            if sealed_groups > 0:
                borrowed = centre[:, :, sealed_groups - 1]
                centre[:, :, sealed_groups] = borrowed
            else:
                borrowed = centre[:, :, 0].zero_()
            centred = finite_keys(keys[:, :, start:stop]) - borrowed.float().unsqueeze(2)
            self._quantize(state, centred, start)

    def calibrate(self, state: list[Tensor], query: Tensor, keys: Tensor, length: int) -> bool:
        """Set the balance from sampled queries ``[B, H, n, D]`` and up to 32 groups of keys.

        With fewer than 128 tokens there is too little to learn from and the balance stays.
        """
        num_groups = length // self.group_size
        if length < MIN_CALIBRATION_TOKENS or num_groups == 0:
            return False
        num_chosen = min(num_groups, _CALIBRATION_GROUPS)
        # Evenly spaced, and made where the keys are: a copy from the host would wait for them.
        chosen = torch.arange(num_chosen, device=keys.device) * (num_groups - 1)
        chosen //= max(num_chosen - 1, 1)
        within = torch.arange(self.group_size, device=keys.device)
        tokens = (chosen[:, None] * self.group_size + within).flatten()
        sampled = keys.index_select(2, tokens)
        groups = finite_keys(sampled).unflatten(2, (-1, self.group_size))
        key_energy = (groups - groups.mean(3, keepdim=True)).square().mean((2, 3))  # [B, H, D]
        query_energy = finite_keys(query).square().mean(2)
        balance = (_floored(query_energy) / _floored(key_energy)).pow(0.25)
        # Only the ratios between channels matter; a geometric mean of 1 keeps scales in float16.
        balance /= balance.log().mean(-1, keepdim=True).exp()
        state[3].copy_(balance)
        return True

    def scores(
        self, state: list[Tensor], query: Tensor, length: int, *, margin: float = 0.0
    ) -> Tensor:
        """``a (R (q / d)) . b + q . mu`` for ``query [B, H, M, D]``: ``[B, H, M, length]``.

        Args:
            margin: adds so many times ``a |R (q / d)|``, by which the estimate may be too low. The
                error of 1 bit is about 0.6 of that.
        """
        planes, scale, centre = (tensor[:, :, : num_tiles(length)] for tensor in state[:3])
        balance, rotation = state[3], state[-1]
        rotated = rotate(query / balance.unsqueeze(2), rotation)
        high = plane_dot(planes[..., :ROWS, :], rotated)  # [B, H, M, tiles * 512]
        total = rotated.sum(-1, keepdim=True)
        if self.bits == 1:
            projected = 2 * high - total
        else:
            low = plane_dot(planes[..., ROWS:, :], rotated)
            projected = 4 * high + 2 * low - 3 * total
        if margin:
            projected = projected + margin * rotated.norm(dim=-1, keepdim=True)
        means = query @ centre.float().flatten(2, 3).transpose(2, 3)  # [B, H, M, groups]
        projected = projected * scale.float().flatten(2).unsqueeze(2)
        projected = projected.unflatten(3, (-1, self.group_size)) + means.unsqueeze(4)
        return projected.flatten(3)[..., :length]

    def dequantize(self, state: list[Tensor], length: int) -> Tensor:
        """``mu + R' (a b) / d``: float32 ``[B, H, length, D]``."""
        planes, scale, centre = (tensor[:, :, : num_tiles(length)] for tensor in state[:3])
        balance, rotation = state[3], state[-1]
        levels = 2 * read_bits(planes[..., :ROWS, :]).float() - 1
        if self.bits == 2:
            levels = 2 * levels + 2 * read_bits(planes[..., ROWS:, :]).float() - 1
        x = levels * scale.float().flatten(2).unsqueeze(3)
        # The inverse of a rotation is its transpose.
        centred = rotate(x, rotation.T) / balance.unsqueeze(2)
        means = centre.float().flatten(2, 3).repeat_interleave(self.group_size, 2)
        return (centred + means)[:, :, :length]

    def refined_scores(self, state: list[Tensor], query: Tensor, tokens: Tensor) -> Tensor:
        """Estimates of ``q . k`` of some tokens by the refinement's codes; see `KeyIndex`."""
        refinement = self.refinement
        planes, scale, centre, balance, codes, ratio, rotation = state
        rotated = rotate((query / balance[:, :, None, None]).flatten(2, 3), rotation)
        chosen = tokens.flatten(2)  # [B, H, R * n]
        levels, own_scale = refinement.decode(
            _bits_at(planes, chosen), _rows_at(codes, chosen), _rows_at(ratio, chosen)
        )
        own_scale = own_scale * scale.flatten(2).gather(2, chosen).float()
        x = (levels * own_scale.unsqueeze(3)).unflatten(2, tokens.shape[2:])
        scores = rotated.view(query.shape) @ x.transpose(3, 4)  # [B, H, R, G, n]
        means = query @ centre.float().flatten(2, 3).unsqueeze(2).transpose(3, 4)
        groups = (tokens // self.group_size).unsqueeze(3).expand_as(scores)
        return scores + means.gather(4, groups)

    def _quantize(self, state: list[Tensor], centred: Tensor, start: int) -> None:
        """Write bits and scales of ``centred [B, H, n, D]``, the keys less their centre."""
        planes, scale, balance, rotation = state[0], state[1], state[3], state[-1]
        x = rotate(centred * balance.unsqueeze(2), rotation)
        is_high = x >= 0
        magnitude = x.abs().double()
        energy = magnitude.square().sum(-1)
        if self.bits == 1:
            overlap = magnitude.sum(-1)
        else:
            threshold = TWO_BIT_THRESHOLD * (energy / self.head_dim).sqrt()
            is_outer = magnitude > threshold.unsqueeze(-1)
            overlap = (magnitude * (1 + 2 * is_outer)).sum(-1)
            write_bits(planes[..., ROWS:, :], start, is_high == is_outer)
        write_bits(planes[..., :ROWS, :], start, is_high)
        length = to_float16(torch.where(overlap > 0, energy / overlap, 0.0))
        stop = start + centred.shape[2]
        scale.view(*scale.shape[:2], -1)[:, :, start:stop] = length
        if self.refine_bits:
            own = self.refinement.encode(is_high, magnitude, energy, overlap)
            for tensor, code in zip(state[4:-1], own, strict=True):
                tensor.view(*tensor.shape[:2], -1, tensor.shape[4])[:, :, start:stop] = code


def _bits_at(planes: Tensor, tokens: Tensor) -> Tensor:
    """The bits of ``tokens [B, H, n]`` out of planes ``[B, H, tiles, 32, D]``: ``[B, H, n, D]``."""
    tile, place = tokens // TILE_SIZE, tokens % TILE_SIZE
    rows = (tile * ROWS + place % ROWS).unsqueeze(3).expand(-1, -1, -1, planes.shape[4])
    words = planes.flatten(2, 3).gather(2, rows)
    return ((words >> (place // ROWS).unsqueeze(3)) & 1).bool()


def _rows_at(tensor: Tensor, tokens: Tensor) -> Tensor:
    """Rows of ``[B, H, tiles, 512, n]`` by ``tokens [B, H, m]``: ``[B, H, m, n]``."""
    at = tokens.unsqueeze(3).expand(-1, -1, -1, tensor.shape[4])
    return tensor.flatten(2, 3).gather(2, at)


def _floored(energy: Tensor) -> Tensor:
    """Energies no smaller than a millionth of their mean, and never zero."""
    return energy.clamp_min(1e-20).maximum(1e-6 * energy.mean(-1, keepdim=True))
