"""Checks of compiled masks that hold on any device: values are a unit matrix, outputs weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, flex_attention, or_masks

from fierpatch.flex import (
    block_mask_of,
    causal_mask_mod,
    padding_mask_mod,
    selected_blocks_mask_mod,
    selected_mask_mod,
    sinks_and_recent_mask_mod,
)
from flex.cases import Case

FOLDED = Case(2, 2, 3, 5, 71, True, 0)


def check_masks(device: str, case: Case = FOLDED) -> None:
    """Folded queries of a chunk see what is before them, no padding, and kept or selected.

    Masks that change in one compiled graph, for one shape; the values' width is the length.
    """
    case = replace(case, device=device)
    layout, length = case.layout, case.length
    lead = (case.batch_size, case.num_kv_heads)

    def mask_of(words: Tensor, is_token: Tensor, offset: Tensor, first: Tensor) -> Any:
        ends = sinks_and_recent_mask_mod(layout, sinks=3, recent=4, offset=offset, first=first)
        return and_masks(
            causal_mask_mod(layout, offset=offset),
            padding_mask_mod(is_token),
            or_masks(ends, selected_mask_mod(layout, words)),
        )

    def weights(query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, *rest: Tensor) -> Any:
        sizes = (layout.num_rows, length)
        mask = block_mask_of(blocks, mask_of(*rest), seq_lengths=sizes, block_size=(128, 16))
        return flex_attention(query, keys, values, block_mask=mask)

    compiled = torch.compile(weights, fullgraph=True, dynamic=False)
    values = torch.eye(length, device=device).expand(*lead, length, length).contiguous()
    last = max(length - case.num_queries, 0)
    for seed, offset in enumerate((last // 2, last, 0), case.seed):
        generator = torch.Generator().manual_seed(seed)
        query, keys = (
            torch.randn(*lead, n, 16, generator=generator).to(device)
            for n in (layout.num_rows, length)
        )
        lists = (case.batch_size, case.num_query_heads, case.num_queries, -(-length // 32))
        words = torch.randint(-(2**31), 2**31, lists, generator=generator).int()
        first = torch.randint(0, length // 4 + 1, (case.batch_size,), generator=generator)
        drawn = (words, torch.arange(length) >= first[:, None], torch.tensor(offset), first)
        rest = tuple(tensor.to(device) for tensor in drawn)
        cells = case.cells(mask_of(*rest)).unflatten(1, (*lead[1:], -1)).flatten(2, 3)
        padded = torch.nn.functional.pad(cells, (0, -length % 16))
        blocks = padded.unflatten(3, (-1, 16)).any(4).any(2)
        output = compiled(query, keys, values, blocks[:, :, None], *rest)
        assert torch.equal(output > 0, cells)


def check_chunk(device: str, *, num_queries: int, block_size: tuple[int, int]) -> None:
    """A chunk of a prefill, unfolded, visits its partial and full blocks and no others."""
    offset = 110
    length = offset + num_queries
    case = Case(1, 2, 2, num_queries, length, False, 0, device)
    generator = case.generator
    shape = (-(-num_queries // block_size[0]), -(-length // block_size[1]))
    chosen = (torch.rand(1, 2, *shape, generator=generator) < 0.6).to(device)
    mask_mod = and_masks(
        causal_mask_mod(case.layout, offset=offset),
        selected_blocks_mask_mod(case.layout, chosen, block_size=block_size),
    )
    cells = case.cells(mask_mod)
    room = (0, -length % block_size[1], 0, -num_queries % block_size[0])
    padded = torch.nn.functional.pad(cells, room).unflatten(3, (shape[1], -1))
    padded = padded.unflatten(2, (shape[0], -1))  # [B, Hq, query blocks, queries, blocks, keys]
    is_full = padded.all(5).all(3)
    is_partial = padded.any(5).any(3) & ~is_full
    mask = block_mask_of(
        is_partial,
        mask_mod,
        seq_lengths=(num_queries, length),
        block_size=block_size,
        is_full=is_full,
    )
    query = torch.randn(1, 4, num_queries, 16, generator=generator).to(device)
    keys = torch.randn(1, 2, length, 16, generator=generator).to(device)
    units = torch.eye(length, device=device).expand(1, 2, -1, -1)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    # A few columns of weights at once, as a kernel on CUDA holds a tile of all columns.
    for columns in range(0, length, 64):
        part = slice(columns, min(columns + 64, length))
        values = torch.nn.functional.pad(units[..., part], (0, columns + 64 - part.stop))
        output = compiled(query, keys, values.contiguous(), block_mask=mask, enable_gqa=True)
        assert torch.equal(output[..., : part.stop - columns] > 0, cells[..., part])
