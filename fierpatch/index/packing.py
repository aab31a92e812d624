"""Bit planes: the packed layout of every index, 512 tokens a tile.

A tile holds the bits of 512 tokens as int16 words ``[32, D]``: bit ``p`` of the word at row ``r``,
channel ``c`` belongs to token ``32 p + r`` of the tile. So a plane is one AND away from being the
operand of a matrix product, and D neighbouring words are one coalesced read.
Words are int16 because PyTorch has few uint16 operators; the bits are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_SIZE = 512
NUM_PLANES = 16
ROWS = TILE_SIZE // NUM_PLANES

_TILES_AT_ONCE = 16  # bounds the temporary of packing to 8192 tokens
_ELEMENTS_AT_ONCE = 1 << 18  # of expanded planes: few operators, and a temporary that caches hold


def num_tiles(num_tokens: int) -> int:
    """Tiles that hold `num_tokens` tokens."""
    return -(-num_tokens // TILE_SIZE)


def write_bits(planes: Tensor, start: int, bits: Tensor) -> None:
    """Set the bits of tokens ``start, start + 1, ...`` in place and leave all others alone.

    Args:
        planes: int16 ``[B, H, tiles, 32, D]``.
        start: first token written.
        bits: bool ``[B, H, n, D]``.
    """
    stop = start + bits.shape[2]
    first_whole = min(-(-start // TILE_SIZE), stop // TILE_SIZE)
    last_whole = max(stop // TILE_SIZE, first_whole)
    whole_start, whole_stop = first_whole * TILE_SIZE, last_whole * TILE_SIZE
    if first_whole == last_whole:
        _write_rows(planes, start, bits)
        return
    _write_rows(planes, start, bits[:, :, : whole_start - start])
    for tile in range(first_whole, last_whole, _TILES_AT_ONCE):
        end = min(tile + _TILES_AT_ONCE, last_whole)
        tokens = bits[:, :, tile * TILE_SIZE - start : end * TILE_SIZE - start]
        words = tokens.unflatten(2, (end - tile, NUM_PLANES, ROWS)).to(torch.int16)
        shifted = words << _shifts(planes.device)
        planes[:, :, tile:end] = shifted.sum(3, dtype=torch.int16)
    _write_rows(planes, whole_stop, bits[:, :, whole_stop - start :])


def read_bits(planes: Tensor) -> Tensor:
    """All bits of ``[B, H, tiles, 32, D]`` planes as bool ``[B, H, tiles * 512, D]``."""
    words = planes.unsqueeze(3) >> _shifts(planes.device)  # [B, H, tiles, 16, 32, D]
    return (words & 1).bool().flatten(2, 4)


def plane_dot(planes: Tensor, query: Tensor) -> Tensor:
    """Sum of the query's channels over the set bits of every token, without unpacking them all.

    Args:
        planes: int16 ``[B, H, tiles, 32, D]``.
        query: float32 ``[B, H, M, D]``, or ``[B, H, tiles, 16, M, D]`` where every tile and plane
            has a query of its own.

    Returns:
        float32 ``[B, H, M, tiles * 512]``.
    """
    batch_size, num_heads, tiles, rows, head_dim = planes.shape
    num_queries = query.shape[-2]
    if is_shared := query.ndim == 4:
        words = planes.reshape(batch_size * num_heads, tiles * rows, head_dim)
        operands = query.flatten(0, 1).expand(NUM_PLANES, -1, -1, -1)
    else:
        words = planes.reshape(batch_size * num_heads * tiles, rows, head_dim)
        operands = query.flatten(0, 2).transpose(0, 1)  # [16, B * H * tiles, M, D]
    at_once = 1
    while at_once < NUM_PLANES and 2 * at_once * words.numel() <= _ELEMENTS_AT_ONCE:
        at_once *= 2
    # A masked word is 0 or its plane's power of two, exact in float32; plane 15 is the sign.
    weights = (1 << _shifts(planes.device)).unsqueeze(3)  # [16, 1, 1, 1]
    masked = words.new_empty((at_once, *words.shape))
    values = torch.empty_like(masked, dtype=query.dtype)
    sums = query.new_empty((NUM_PLANES, words.shape[0], num_queries, words.shape[1]))
    for first in range(0, NUM_PLANES, at_once):
        part = slice(first, first + at_once)
        torch.bitwise_and(words, weights[part], out=masked)
        values.copy_(masked)
        torch.bmm(
            operands[part].flatten(0, 1), values.flatten(0, 1).mT, out=sums[part].flatten(0, 1)
        )
    sums.mul_(1.0 / weights)
    if is_shared:
        sums = sums.view(NUM_PLANES, batch_size, num_heads, num_queries, tiles, rows)
        sums = sums.permute(1, 2, 3, 4, 0, 5)
    else:
        sums = sums.view(NUM_PLANES, batch_size, num_heads, tiles, num_queries, rows)
        sums = sums.permute(1, 2, 4, 3, 0, 5)
    return sums.reshape(batch_size, num_heads, num_queries, tiles * TILE_SIZE)


def _write_rows(planes: Tensor, start: int, bits: Tensor) -> None:
    """`write_bits` for a few tokens: one pair of word operations a block of 32."""
    stop = start + bits.shape[2]
    token = start
    while token < stop:
        end = min(stop, (token // ROWS + 1) * ROWS)
        tile, plane, row = token // TILE_SIZE, token // ROWS % NUM_PLANES, token % ROWS
        words = planes[:, :, tile, row : row + end - token]
        new = bits[:, :, token - start : end - start].to(torch.int16) << plane
        keep = ~(1 << plane) if plane < 15 else 0x7FFF
        words.bitwise_and_(keep).bitwise_or_(new)
        token = end


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(NUM_PLANES, dtype=torch.int16, device=device)[:, None, None]
