"""Block masks from blocks that were chosen: which blocks of keys a kernel visits.

A kernel on CUDA visits the blocks listed and asks the mask_mod about the cells in them; eager
FlexAttention asks about every cell and reads no list. So each mask here has both, and its mask_mod
is exact by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from fierpatch.errors import ConfigError, ShapeError
from fierpatch.flex.masks import MaskMod

# What the decode kernel of FlexAttention takes (torch 2.11 to 2.13): its tiles are of 64 keys or of
# a block where that is smaller, and tl.dot wants a power of two of at least 16.
BLOCK_SIZES = (16, 32, 64, 128)
_QUERY_BLOCK_SIZE = 128  # which any tile of queries divides


def check_block_size(block_size: int) -> None:
    """Check the keys of a block.

    Raises:
        ConfigError: no kernel of FlexAttention takes such blocks.
    """
    if block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size={block_size} is none that FlexAttention's decode kernel can cut into "
            f"tiles: choose from {', '.join(map(str, BLOCK_SIZES))}"
        )


def decode_block_mask(
    num_blocks: Tensor,
    block_indices: Tensor,
    mask_mod: MaskMod,
    *,
    seq_lengths: tuple[int, int],
    block_size: int,
) -> BlockMask:
    """A block mask whose queries, few as they are, make one block.

    Without full blocks, which unbalance the split of the decode kernel on CUDA.

    Args:
        num_blocks, block_indices: as in `SelectionMask`.
        mask_mod: exact for every cell.
        seq_lengths: rows of queries, and keys.
        block_size: keys of a block.
    """
    query_size = -(-seq_lengths[0] // _QUERY_BLOCK_SIZE) * _QUERY_BLOCK_SIZE
    return BlockMask.from_kv_blocks(
        num_blocks,
        block_indices,
        BLOCK_SIZE=(query_size, block_size),
        mask_mod=mask_mod,
        seq_lengths=seq_lengths,
        compute_q_blocks=False,
    )


def ordered_blocks(is_chosen: Tensor) -> tuple[Tensor, Tensor]:
    """A map of blocks as the lists that FlexAttention takes, by a running sum and no sorting.

    Args:
        is_chosen: bool ``[..., N]``.

    Returns:
        int32 ``[...]``, how many blocks each row has, and int32 ``[..., N]``: these blocks,
        ascending, then zeros.
    """
    num_blocks = is_chosen.sum(-1, dtype=torch.int32)
    place = is_chosen.cumsum(-1) - 1
    # A block that is not chosen goes one past the end, which is cut off.
    place = torch.where(is_chosen, place, is_chosen.shape[-1])
    numbers = torch.arange(is_chosen.shape[-1], dtype=torch.int32, device=is_chosen.device)
    listed = numbers.new_zeros((*is_chosen.shape[:-1], is_chosen.shape[-1] + 1))
    listed.scatter_(-1, place, numbers.expand(is_chosen.shape))
    return num_blocks, listed[..., :-1].contiguous()


def block_mask_of(
    is_partial: Tensor,
    mask_mod: MaskMod,
    *,
    seq_lengths: tuple[int, int],
    block_size: tuple[int, int],
    is_full: Tensor | None = None,
) -> BlockMask:
    """A block mask from maps of blocks, for a prefill.

    Args:
        is_partial: bool ``[B, H, query blocks, key blocks]``: blocks whose cells the mask_mod is
            asked about.
        mask_mod: exact for every cell of every block, visited or not.
        seq_lengths: queries and keys, which may end within a block.
        block_size: queries and keys of a block.
        is_full: likewise, the blocks whose cells are all allowed; none may be partial too.

    Raises:
        ShapeError: there are more or fewer blocks than the lengths have.
    """
    wanted = tuple(-(-length // size) for length, size in zip(seq_lengths, block_size, strict=True))
    for name, blocks in (("is_partial", is_partial), ("is_full", is_full)):
        if blocks is not None and (blocks.ndim != 4 or tuple(blocks.shape[2:]) != wanted):
            raise ShapeError(
                f"{name} of shape {tuple(blocks.shape)} does not cover {seq_lengths} queries and "
                f"keys by blocks of {block_size}: want [B, H, {wanted[0]}, {wanted[1]}]"
            )
    num_blocks, block_indices = ordered_blocks(is_partial)
    num_full, full_indices = (None, None) if is_full is None else ordered_blocks(is_full)
    return BlockMask.from_kv_blocks(
        num_blocks,
        block_indices,
        num_full,
        full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=seq_lengths,
        compute_q_blocks=False,
    )
