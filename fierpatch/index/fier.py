"""The index of FIER as published: one bit a channel against the middle of its group's range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fierpatch.errors import ConfigError
from fierpatch.index.base import check_group_size, finite_keys, to_float16
from fierpatch.index.packing import ROWS, TILE_SIZE, num_tiles, plane_dot, read_bits, write_bits

_TOKENS_AT_ONCE = 8192  # bounds the temporaries of a long append


@dataclass(frozen=True)
class FierIndex:
    """FIER's 1-bit keys (arXiv 2508.08256, section 3.1).

    Groups of `group_size` consecutive tokens share, for every channel, ``zero = (max + min) / 2``
    and ``scale = (max - min) / 2``; a key entry is one bit, ``k >= zero``, and stands for
    ``zero + scale`` or ``zero - scale``. The state is planes int16 ``[B, H, tiles, 32, D]``, scale
    and zero float16 ``[B, H, tiles, 512 / group_size, D]``.
    """

    head_dim: int
    group_size: int = 32

    num_constants: ClassVar[int] = 0
    tiled: ClassVar[tuple[bool, ...]] = (True, True, True)
    candidate_margin: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    @property
    def bytes_per_token(self) -> float:
        """Bits, and two float16 a channel and group: ``D / 8 + 4 D / group_size``."""
        return self.head_dim / 8 + 4 * self.head_dim / self.group_size

    @property
    def scanned_bytes_per_token(self) -> float:
        """All of them."""
        return self.bytes_per_token

    @property
    def refined_bytes_per_token(self) -> float:
        """0: it has no codes."""
        return 0.0

    def allocate(
        self, batch_size: int, num_kv_heads: int, num_tokens: int, device: torch.device
    ) -> list[Tensor]:
        """An empty state with room for `num_tokens` tokens, rounded up to tiles of 512."""
        lead = (batch_size, num_kv_heads, num_tiles(num_tokens))
        groups = TILE_SIZE // self.group_size
        planes = torch.zeros(*lead, ROWS, self.head_dim, dtype=torch.int16, device=device)
        scale = torch.zeros(*lead, groups, self.head_dim, dtype=torch.float16, device=device)
        return [planes, scale, torch.zeros_like(scale)]

    def append(self, state: list[Tensor], keys: Tensor, start: int, stop: int) -> None:
        """Index tokens ``start .. stop`` of ``keys [B, H, C, D]``, and the open group before."""
        start -= start % self.group_size
        for first in range(start, stop, _TOKENS_AT_ONCE):
            last = min(first + _TOKENS_AT_ONCE, stop)
            sealed = last - last % self.group_size
            if sealed > first:
                self._append_groups(state, keys[:, :, first:sealed], first, self.group_size)
            if last > sealed:
                self._append_groups(state, keys[:, :, sealed:last], sealed, last - sealed)

    def calibrate(self, state: list[Tensor], query: Tensor, keys: Tensor, length: int) -> bool:
        """FIER needs no calibration."""
        return False

    def scores(
        self, state: list[Tensor], query: Tensor, length: int, *, margin: float = 0.0
    ) -> Tensor:
        """``q . K~`` for ``query [B, H, M, D]``: float32 ``[B, H, M, length]`` (FIER, Eq. 5)."""
        if margin:
            raise ConfigError(f"{self} knows no margin of its scores: use index='rotated'")
        planes, scale, zero = (tensor[:, :, : num_tiles(length)] for tensor in state)
        # One plane is 32 tokens of one group, so each tile and plane has its own scaled query.
        planes_per_group = self.group_size // ROWS
        scale = scale.float().repeat_interleave(planes_per_group, 3)  # [B, H, tiles, 16, D]
        zero = zero.float().repeat_interleave(planes_per_group, 3)
        scaled = query[:, :, None, None] * scale.unsqueeze(4)  # [B, H, tiles, 16, M, D]
        offset = torch.einsum("bhmd,bhtpd->bhmtp", query, zero) - scaled.sum(-1).permute(
            0, 1, 4, 2, 3
        )
        sums = plane_dot(planes, scaled).unflatten(3, (-1, ROWS))  # [B, H, M, blocks, 32]
        return (2 * sums + offset.flatten(3).unsqueeze(4)).flatten(3)[..., :length]

    def refined_scores(self, state: list[Tensor], query: Tensor, tokens: Tensor) -> Tensor:
        """None: FIER has no codes beside those it scans."""
        raise ConfigError(f"{self} has no codes to refine by: use index='rotated'")

    def dequantize(self, state: list[Tensor], length: int) -> Tensor:
        """``zero + scale`` where the bit is set, else ``zero - scale``: ``[B, H, length, D]``."""
        planes, scale, zero = (tensor[:, :, : num_tiles(length)] for tensor in state)
        signs = read_bits(planes).float().mul(2).sub(1)  # [B, H, tiles * 512, D]
        scale, zero = (
            x.float().flatten(2, 3).repeat_interleave(self.group_size, 2) for x in (scale, zero)
        )
        return (zero + signs * scale)[:, :, :length]

    def _append_groups(self, state: list[Tensor], keys: Tensor, start: int, size: int) -> None:
        """Quantise whole groups of `size` tokens; `size` is below group_size for an open one."""
        planes, scale, zero = state
        groups = finite_keys(keys).unflatten(2, (-1, size))  # [B, H, groups, size, D]
        low, high = groups.amin(3), groups.amax(3)
        middle = (high + low) / 2
        bits = groups >= middle.unsqueeze(3)
        write_bits(planes, start, bits.flatten(2, 3))
        first = start // self.group_size
        last = first + groups.shape[2]
        by_group = (*groups.shape[:2], -1, self.head_dim)
        zero.view(by_group)[:, :, first:last] = to_float16(middle)
        scale.view(by_group)[:, :, first:last] = to_float16((high - low) / 2)
