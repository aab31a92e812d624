"""Selected rows side by side: the buffer of `budget` rows a list that FlexAttention reads whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.flex.limits import can_fuse

# Hidden from the compiler on CPUs, see `can_fuse`.
_LIBRARY = torch.library.Library("fierpatch", "FRAGMENT")
_LIBRARY.define(
    "flex_gather(Tensor keys, Tensor values, Tensor token_indices, bool with_sink, "
    "int block_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def gather_rows(
    keys: Tensor, values: Tensor, token_indices: Tensor, *, with_sink: bool, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows of every list, each query's as a head of its own. Fit for a compiled function.

    Args:
        keys, values: ``[B, H, S, D]`` and ``[B, H, S, Dv]``.
        token_indices: integers ``[B, L, T, K]``, L a multiple of H; -1 marks an unused slot.
        with_sink: a row of zeros in front of each list, for a logit that has no token.
        block_size: rows of a block.

    Returns:
        Keys and values ``[B, L * T, R, D]`` and ``[B, L * T, R, Dv]`` with R = K or K + 1; bool
        ``[B, L * T, R]``, which rows count; int32 ``[B, L * T, 1]``, how many blocks hold these;
        and int32 ``[B, L * T, 1, ceil(R / block_size)]``, the blocks in order.
    """
    gather = _gather if can_fuse(keys) else torch.ops.fierpatch.flex_gather.default
    return gather(keys, values, token_indices, with_sink, block_size)


def _gather(
    keys: Tensor, values: Tensor, token_indices: Tensor, with_sink: bool, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch_size, num_kv_heads, length, _ = keys.shape
    is_used = (token_indices >= 0).flatten(1, 2)
    lists = token_indices.long().flatten(1, 2)  # [B, L * T, K]
    # An unused slot reads a token that the row does use: its weight is 0, and padding may be NaN.
    lists = torch.where(is_used, lists, lists.amax(-1, keepdim=True).clamp_min(0))
    if with_sink:
        lists = torch.cat((lists[..., :1], lists), dim=2)
        is_used = torch.nn.functional.pad(is_used, (1, 0), value=True)
    num_heads, num_rows = lists.shape[1:]
    kv_head = torch.arange(num_heads, device=keys.device) // (num_heads // num_kv_heads)
    batch = torch.arange(batch_size, device=keys.device)

    def gather(tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            head = batch[:, None] * num_kv_heads + kv_head
            flat = (head[:, :, None] * length + lists).flatten()
            rows = tensor.view(-1, tensor.shape[3]).index_select(0, flat)
            rows = rows.view(*lists.shape, -1)
        else:
            rows = tensor[batch[:, None, None], kv_head[:, None], lists].contiguous()
        if with_sink:
            rows[:, :, 0] = 0.0
        return rows

    number = torch.arange(1, num_rows + 1, device=keys.device)
    last = torch.where(is_used, number, 0).amax(-1, keepdim=True)
    num_blocks = (last + block_size - 1).div(block_size, rounding_mode="floor").int()
    numbers = torch.arange(-(-num_rows // block_size), dtype=torch.int32, device=keys.device)
    block_indices = numbers.repeat(batch_size, num_heads, 1, 1)
    return gather(keys), gather(values), is_used, num_blocks, block_indices


def _gather_fake(
    keys: Tensor, values: Tensor, token_indices: Tensor, with_sink: bool, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_gather` returns, without the numbers."""
    batch_size, num_lists, num_queries, width = token_indices.shape
    lead = (batch_size, num_lists * num_queries)
    num_rows = width + int(with_sink)  # which a symbol does not add as a bool
    return (
        keys.new_empty((*lead, num_rows, keys.shape[3])),
        values.new_empty((*lead, num_rows, values.shape[3])),
        keys.new_empty((*lead, num_rows), dtype=torch.bool),
        keys.new_empty((*lead, 1), dtype=torch.int32),
        keys.new_empty((*lead, 1, -(-num_rows // block_size)), dtype=torch.int32),
    )


_LIBRARY.impl("flex_gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("fierpatch::flex_gather", _gather_fake, lib=_LIBRARY)
