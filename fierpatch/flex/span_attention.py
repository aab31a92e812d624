"""Attention of one span of a prompt under its choice of blocks: specification and kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, flex_attention

from fierpatch.flex.block_mask import block_mask_of
from fierpatch.flex.blocks import KEY_BLOCK, QUERY_BLOCK, Span, rows_visible, whole_blocks
from fierpatch.flex.masks import (
    MaskMod,
    QueryLayout,
    causal_mask_mod,
    padding_mask_mod,
    selected_blocks_mask_mod,
)
from fierpatch.reference import masked_attention

# Of the largest temporary. In the reference so few that the memory is used again, which a CPU would
# otherwise map anew each time: it took half of the time.
ELEMENTS_AT_ONCE = {"reference": 1 << 22, "triton": 1 << 26}

# Kernels of one process: dtypes, head sizes, masks and caps, each for a fixed and for any length.
_MOST_KERNELS = 64
# Queries and keys of a tile, up to 128 channels and beyond: in three stages they fit an A100 too.
_HALF_TILES, _FLOAT_TILES = ((128, 64), (64, 32)), ((32, 64), (32, 16))


@dataclass(frozen=True)
class Operands:
    """What a prompt attends with, all spans of it.

    Args:
        query: ``[B, Hq, T, D]``, the newest T of S tokens.
        keys, values: ``[B, H, S, D]``, ``[B, H, S, Dv]``.
        scale, softcap, sink_logits: as in `fierpatch.select.attention_weights`.
        visible: bool ``[B, 1, T or 1, S]``, beside causality; None means every token.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    softcap: float = 0.0
    sink_logits: Tensor | None = None
    visible: Tensor | None = None


def attend_reference(operands: Operands, span: Span, chosen: Tensor) -> Tensor:
    """Dense attention under the mask, a few queries at a time, over what comes before them.

    Args:
        operands: the prompt.
        span: the blocks of queries.
        chosen: bool ``[B, Hq, blocks, key blocks]``, causal.

    Returns:
        ``[B, Hq, queries of the span, Dv]``; 0 for a query that sees nothing.
    """
    query, visible = operands.query, operands.visible
    row_size = query.shape[0] * query.shape[1] * span.length
    rows_at_once = max(ELEMENTS_AT_ONCE["reference"] // row_size, 1)
    outputs = []
    for start in range(span.rows.start, span.rows.stop, rows_at_once):
        rows = slice(start, min(start + rows_at_once, span.rows.stop))
        stop = span.stored + rows.stop  # nothing behind it is visible
        row = torch.arange(rows.start, rows.stop, device=span.device)
        blocks = chosen[:, :, row // QUERY_BLOCK - span.first]
        allowed = blocks.repeat_interleave(KEY_BLOCK, 3)[..., :stop]
        allowed = allowed & (torch.arange(stop, device=span.device) <= span.stored + row[:, None])
        if visible is not None:
            allowed = allowed & rows_visible(visible, rows)[..., :stop]
        attended = masked_attention(
            query[:, :, rows], operands.keys[:, :, :stop], operands.values[:, :, :stop], allowed,
            scale=operands.scale, softcap=operands.softcap, sink_logits=operands.sink_logits,
        )  # fmt: skip
        outputs.append(attended)
    return torch.cat(outputs, dim=2)


def attend_flex(operands: Operands, span: Span, chosen: Tensor) -> Tensor:
    """The same by FlexAttention, compiled: on a GPU in time that goes by the density.

    Blocks that every query sees whole are not asked about token by token. A CPU is left to the
    reference: there the kernel visits every block too, returns no log-sum-exp, which attention
    sinks need, and does not compile for lengths that vary (PyTorch 2.13).
    """
    query = operands.query[:, :, span.rows]
    options: dict[str, Any] = {"kernel_options": _kernel_options(operands)} if query.is_cuda else {}
    sinks = operands.sink_logits
    # A kernel for every length is made when the second one comes, and none after that.
    with torch._dynamo.config.patch(recompile_limit=_MOST_KERNELS):
        result = _compiled()(
            query, operands.keys, operands.values,
            score_mod=_cap(operands.softcap), block_mask=span_mask(operands, span, chosen),
            scale=operands.scale, enable_gqa=query.shape[1] != operands.keys.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True), **options,
        )  # fmt: skip
    if sinks is None:
        attended: Tensor = result
        return attended
    attended, found = result
    # A logit beside the tokens' takes its share of the weight and adds nothing.
    share = torch.sigmoid(found.lse - sinks.float()[:, None])
    return attended * share.unsqueeze(3).to(attended.dtype)


def _kernel_options(operands: Operands) -> dict[str, Any]:
    """What torch is told of the kernel on CUDA."""
    # By its name, because another one would be a silent fallback.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    head_dims = {operands.keys.shape[3], operands.values.shape[3]}
    if head_dims not in ({128}, {256}):
        # Torch's own tiles are fit for these. Of 64 channels Hopper's have more keys than a block;
        # and for widths that are no power of two they can be more than shared memory holds.
        is_wide = max(head_dims) > 128
        tiles = _HALF_TILES if operands.keys.element_size() == 2 else _FLOAT_TILES
        options["BLOCK_M"], options["BLOCK_N"] = tiles[is_wide]
    return options


def span_mask(operands: Operands, span: Span, chosen: Tensor) -> BlockMask:
    """The block mask of a span; its mask_mod is exact for every cell.

    The map of blocks has a row for every query head. One for every KV head would mean other heads
    on CUDA than on a CPU where ``enable_gqa`` is on.
    """
    visible = operands.visible
    layout = QueryLayout(operands.query.shape[1], span.rows.stop - span.rows.start)
    block_size = (QUERY_BLOCK, KEY_BLOCK)
    # A tensor, as another offset would compile the kernel anew.
    offset = torch.full((), span.stored + span.rows.start, device=span.device)
    mask_mods = [
        selected_blocks_mask_mod(layout, chosen, block_size=block_size),
        causal_mask_mod(layout, offset=offset),
    ]
    if visible is not None and visible.shape[2] == 1:
        mask_mods.append(padding_mask_mod(visible[:, 0, 0].expand(chosen.shape[0], -1)))
    elif visible is not None:
        mask_mods.append(_visible_mask_mod(visible[:, 0, span.rows]))
    whole = chosen & whole_blocks(span, visible)
    return block_mask_of(
        chosen & ~whole,
        and_masks(*mask_mods),
        seq_lengths=(layout.num_queries, span.length),
        block_size=block_size,
        is_full=whole if visible is None or visible.shape[2] == 1 else None,
    )


def _visible_mask_mod(visible: Tensor) -> MaskMod:
    """A mask of a prompt's own, bool ``[B or 1, T, S]``."""
    is_shared = visible.shape[0] == 1

    def is_visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return visible[b * 0 if is_shared else b, q_idx, kv_idx]

    return is_visible


def _cap(softcap: float) -> Callable[..., Tensor] | None:
    if softcap <= 0:
        return None

    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return capped


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, fullgraph=True)
